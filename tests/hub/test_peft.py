"""PEFT adapters on packed layers. Merging raises, as there is no weight to add to."""

import pytest
import torch
from support.stacked import inputs_of, logits, make_stacked
from support.stored import STORED, tensors_of
from support.tiny import make_model
from transformers import Trainer, TrainingArguments

from hf_quantnoise import AutoQuantizedModel, FixedPointConfig, IPQConfig, quantize_model

peft = pytest.importorskip("peft", reason="peft is not installed (pip install hf-quantnoise[test])")

PQ, INT8 = STORED["ipq"], STORED["int8"]
LORA = {"r": 4, "init_lora_weights": False}
CASES = {
    "linear": ("bert", PQ, lambda: peft.LoraConfig(target_modules=["query", "dense"], **LORA)),
    "int8": ("bert", INT8,
             lambda: peft.LoraConfig(target_modules=["query", "classifier"], **LORA)),
    "conv1d": ("gpt2", PQ, lambda: peft.LoraConfig(
        target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **LORA)),
    "table": ("bert", PQ, lambda: peft.LoraConfig(target_modules=["word_embeddings"], **LORA)),
    "dora": ("bert", PQ, lambda: peft.LoraConfig(
        target_modules=["query", "dense"], use_dora=True, **LORA)),
    "ia3": ("bert", PQ, lambda: peft.IA3Config(
        target_modules=["query", "dense"], feedforward_modules=["dense"],
        init_ia3_weights=False)),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """Return the name of the model, a function that loads it, and an adapter config."""
    name, config, adapter = CASES[request.param]
    quantize_model(make_stacked(name, 2), config, progress=False).save_pretrained(tmp_path / "base")
    return name, lambda: AutoQuantizedModel.from_pretrained(tmp_path / "base"), adapter()


def test_adapter_trains_saves_and_reloads(case, tmp_path):
    name, load, adapter = case
    plain = logits(load(), name)
    model = peft.get_peft_model(load(), adapter)
    assert not torch.equal(logits(model, name), plain)
    packed = {k: v.clone() for k, v in tensors_of(model).items() if "base_layer" in k}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=10.0)
    model.train()(**inputs_of(name)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in trained)
    before = logits(model, name)
    optimizer.step()
    expected = logits(model, name)
    assert not torch.equal(expected, before)
    assert all(torch.equal(v, packed[k]) for k, v in tensors_of(model).items() if k in packed)

    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    again = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert torch.equal(logits(again, name), expected)
    with again.disable_adapter():
        assert torch.equal(logits(again, name), plain)
    if getattr(adapter, "use_dora", False):
        return  # transformers 5.23 does not find its magnitudes for any layer
    by_transformers = load()
    by_transformers.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(by_transformers, name), expected)
    by_transformers.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "model.safetensors").exists()
    once_more = load()
    once_more.load_adapter(str(tmp_path / "again"))
    assert torch.equal(logits(once_more, name), expected)


def test_merging_raises_until_dequantized(case):
    name, load, adapter = case
    model = peft.get_peft_model(load(), adapter)
    expected = logits(model, name)
    for merge in (
        model.merge_adapter,
        lambda: model.merge_adapter(safe_merge=True),
        model.merge_and_unload,
    ):
        with pytest.raises(ValueError, match=r"merge an adapter.*dequantize"):
            merge()
        torch.testing.assert_close(logits(model, name), expected)
    model.get_base_model().dequantize()
    torch.testing.assert_close(logits(model, name), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, name), expected, rtol=1e-4, atol=1e-5)
    assert not hasattr(merged.config, "quantization_config")


@pytest.mark.parametrize("kind", ["linear", "ia3"])
def test_model_saves_after_unload(kind, tmp_path):
    name, config, adapter = CASES[kind]
    base = quantize_model(make_stacked(name, 2), config, progress=False)
    expected = logits(base, name)
    model = peft.get_peft_model(base, adapter())
    with pytest.raises(ValueError, match=r"peft_model.unload\(\)"):
        base.save_pretrained(tmp_path)
    model.unload().save_pretrained(tmp_path)
    assert torch.equal(logits(AutoQuantizedModel.from_pretrained(tmp_path), name), expected)


def test_initialisation_that_changes_weight_raises():
    base = quantize_model(make_stacked("bert", 1), PQ, progress=False)
    adapter = peft.LoraConfig(target_modules=["query"], r=4, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="cannot be written to"):
        peft.get_peft_model(base, adapter)


# ---- task_type, which trains and saves the head with the adapter
# ----------------------------------

HEADS = {
    "dense": ("bert", FixedPointConfig(bits=8, exclude_modules=["classifier"])),
    "int8": ("bert", INT8),
    "8 bits": ("bert", IPQConfig(block_size=4, n_centroids=8, codebook_bits=8,
                                 stages=["ffn", "head"])),
    "of two layers": ("roberta", INT8),
}  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
def test_task_adapter_trains_dense_or_packed_head(head, tmp_path, parity_data):
    name, config = HEADS[head]
    base = quantize_model(make_model(name), config, progress=False)
    base.save_pretrained(tmp_path / "base")
    plain = logits(base, "bert")
    codes = {n: p.clone() for n, p in tensors_of(base).items() if n.endswith("weight_indices")}
    assert any("classifier" in n for n in codes) == (head != "dense")

    adapter = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2)
    model = peft.get_peft_model(AutoQuantizedModel.from_pretrained(tmp_path / "base"), adapter)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(n.endswith("weight_indices") for n in trained)
    before = {n: p.clone() for n, p in model.named_parameters() if n in trained}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, learning_rate=1e-2, use_cpu=True,
        per_device_train_batch_size=8, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=parity_data.select(range(16)))
    trainer.train()
    moved = {n for n, p in model.named_parameters() if n in trained and not p.equal(before[n])}
    # The zero point of the matrix shifts the logits of both classes alike, so it has no gradient.
    assert all(n.endswith("weight_zero_point") for n in trained - moved)
    assert any("modules_to_save" in n and not n.endswith("bias") for n in moved)
    expected = logits(model, "bert")
    assert not torch.equal(expected, plain)

    trainer.save_model(tmp_path / "adapter")
    load = AutoQuantizedModel.from_pretrained
    again = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again, "bert"), expected)
    with again.disable_adapter():
        assert torch.equal(logits(again, "bert"), plain)
    by_itself = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(by_itself, "bert"), expected)
    for key, tensor in tensors_of(again).items():
        if key.endswith("weight_indices"):
            inner = key.removeprefix("base_model.model.").replace("base_layer.", "")
            inner = inner.replace("original_module.", "").replace("modules_to_save.default.", "")
            assert torch.equal(tensor, codes[inner]), key


def test_packed_table_in_modules_to_save_trains(tmp_path):
    base = quantize_model(make_stacked("gpt2", 2), PQ, progress=False)
    base.save_pretrained(tmp_path / "base")
    load = AutoQuantizedModel.from_pretrained
    adapter = peft.LoraConfig(
        target_modules=["c_attn"], modules_to_save=["wte"], fan_in_fan_out=True, **LORA
    )
    model = peft.get_peft_model(load(tmp_path / "base"), adapter)
    table = model.base_model.model.transformer.wte.modules_to_save["default"]
    before = table.weight_codebook.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()(**inputs_of("gpt2")).logits.sum().backward()
    optimizer.step()
    assert not torch.equal(table.weight_codebook, before)
    expected = logits(model, "gpt2")
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again, "gpt2"), expected)


def test_all_linear_finds_packed_layers():
    base = quantize_model(make_stacked("bert", 2), INT8, progress=False)
    linear = {
        name for name, layer in base.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "classifier"
    }  # fmt: skip
    adapter = peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", **LORA)
    model = peft.get_peft_model(base, adapter)
    found = {name for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    assert {name.removeprefix("base_model.model.") for name in found} == linear
