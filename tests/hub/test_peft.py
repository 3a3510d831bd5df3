"""Adapters of PEFT on top of packed layers; merging is refused, as there is no weight to add to."""

import pytest
import torch
from stacked import inputs_of, make_stacked
from stored import STORED

from hf_quantnoise import AutoQuantizedModel, quantize_model

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


@torch.no_grad()
def output(model, name):
    return model.eval()(**inputs_of(name)).logits


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """Name of the model, a function that loads it, and an adapter's config."""
    name, config, adapter = CASES[request.param]
    quantize_model(make_stacked(name, 2), config, progress=False).save_pretrained(tmp_path / "base")
    return name, lambda: AutoQuantizedModel.from_pretrained(tmp_path / "base"), adapter()


def test_an_adapter_is_trained_saved_and_put_on_again(case, tmp_path):
    name, load, adapter = case
    plain = output(load(), name)
    model = peft.get_peft_model(load(), adapter)
    assert not torch.equal(output(model, name), plain)
    packed = {k: v.clone() for k, v in model.named_parameters() if "base_layer" in k}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=10.0)
    model.train()(**inputs_of(name)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in trained)
    before = output(model, name)
    optimizer.step()
    expected = output(model, name)
    assert not torch.equal(expected, before)
    assert all(torch.equal(v, packed[k]) for k, v in model.named_parameters() if k in packed)

    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    again = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert torch.equal(output(again, name), expected)
    with again.disable_adapter():
        assert torch.equal(output(again, name), plain)
    if getattr(adapter, "use_dora", False):
        return  # transformers 5.23 does not find its magnitudes, whatever the layer
    by_transformers = load()
    by_transformers.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(output(by_transformers, name), expected)
    by_transformers.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "model.safetensors").exists()
    once_more = load()
    once_more.load_adapter(str(tmp_path / "again"))
    assert torch.equal(output(once_more, name), expected)


def test_merging_is_refused_and_right_once_the_model_is_dense(case):
    name, load, adapter = case
    model = peft.get_peft_model(load(), adapter)
    expected = output(model, name)
    for merge in (
        model.merge_adapter,
        lambda: model.merge_adapter(safe_merge=True),
        model.merge_and_unload,
    ):
        with pytest.raises(ValueError, match="merge an adapter.*dequantize"):
            merge()
        torch.testing.assert_close(output(model, name), expected)
    model.get_base_model().dequantize()
    torch.testing.assert_close(output(model, name), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(output(merged, name), expected, rtol=1e-4, atol=1e-5)
    assert not hasattr(merged.config, "quantization_config")


@pytest.mark.parametrize("kind", ["linear", "ia3"])
def test_an_adapter_can_be_taken_off_and_the_model_saved(kind, tmp_path):
    name, config, adapter = CASES[kind]
    base = quantize_model(make_stacked(name, 2), config, progress=False)
    expected = output(base, name)
    model = peft.get_peft_model(base, adapter())
    with pytest.raises(ValueError, match=r"peft_model.unload\(\)"):
        base.save_pretrained(tmp_path)
    model.unload().save_pretrained(tmp_path)
    assert torch.equal(output(AutoQuantizedModel.from_pretrained(tmp_path), name), expected)


def test_beginnings_that_change_the_weight_are_refused():
    base = quantize_model(make_stacked("bert", 1), PQ, progress=False)
    adapter = peft.LoraConfig(target_modules=["query"], r=4, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="cannot be written to"):
        peft.get_peft_model(base, adapter)
