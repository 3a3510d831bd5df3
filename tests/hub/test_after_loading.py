"""Use of a loaded model: training, generation, compilation, new tokens, another head."""

import copy
import os
import shutil

import pytest
import torch
from support.stacked import inputs_of, make_stacked
from support.stored import PQ, stored, tensors_of
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_quantnoise import AutoQuantizedModel, IPQConfig, quantize_model
from hf_quantnoise.modeling import packed_layers

CONFIGS = stored("ipq", "8 bits", "int8")


@torch.no_grad()
def output(model, name, words=320):
    inputs = {key: tensor.clamp(max=words - 1) for key, tensor in inputs_of(name).items()}
    return model.eval()(**inputs).logits


def load(folder, name, config=CONFIGS["ipq"], layers=2):
    quantize_model(make_stacked(name, layers), config, progress=False).save_pretrained(folder)
    return AutoQuantizedModel.from_pretrained(folder)


def reloaded(model, folder):
    model.save_pretrained(folder)
    return AutoQuantizedModel.from_pretrained(folder)


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_trainer_moves_centroids_keeps_codes_and_resumes(kind, parity_data, tmp_path):
    def trainer(model, name, **more):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name), max_steps=4, save_steps=2, learning_rate=1e-2,
            per_device_train_batch_size=8, use_cpu=True, disable_tqdm=True, **more,
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=parity_data, eval_dataset=parity_data)

    model = load(tmp_path / "model", "bert", CONFIGS[kind])
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    first = trainer(model, "run")
    first.train()
    assert first.evaluate()["eval_loss"] > 0
    layers = dict(packed_layers(model))
    for name, tensor in tensors_of(model).items():
        layer, _, leaf = name.rpartition(".")
        if leaf in ("weight_indices", "weight_codebook") and "position" not in layer:
            assert torch.equal(tensor, before[name]) == (leaf == "weight_indices"), name
        if layer in layers and leaf == "weight_scale":
            assert torch.equal(tensor, before[name]) != layers[layer].quantizer.trained, name
    assert torch.equal(
        output(AutoQuantizedModel.from_pretrained(tmp_path / "run" / "checkpoint-4"), "bert"),
        output(reloaded(model, tmp_path / "trained"), "bert"),
    )
    if kind == "ipq":  # with 8 bits a checkpoint rounds the centroids
        second = load(tmp_path / "model", "bert", CONFIGS[kind])
        trainer(second, "run").train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
        assert torch.equal(output(second, "bert"), output(model, "bert"))


def test_trainer_in_bfloat16_with_gradient_checkpointing(parity_data, tmp_path):
    data = parity_data.select(range(16))

    def trained(**more):
        model = load(tmp_path / "model", "bert")
        before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=2, learning_rate=1e-2, bf16=True,
            per_device_train_batch_size=8, use_cpu=True, disable_tqdm=True, save_strategy="no",
            **more,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=data).train()
        for name, tensor in tensors_of(model).items():
            if name.endswith("weight_indices"):
                assert torch.equal(tensor, before[name]), name
        layer = "bert.encoder.layer.0.output.dense.weight_codebook"
        assert not torch.equal(model.get_parameter(layer), before[layer])
        return dict(model.named_parameters())

    plain, recomputed = trained(), trained(gradient_checkpointing=True)
    for name, tensor in plain.items():
        torch.testing.assert_close(
            recomputed[name], tensor, msg=lambda text, n=name: f"{n}: {text}"
        )


# ---- generation ----------------------------------------------------------------------------------

SEARCHES = {
    "greedy": {"do_sample": False},
    "beam": {"num_beams": 3, "do_sample": False},
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("name", ["gpt2", "t5", "bart"])
def test_generation_matches_dequantized_model(name, search, tmp_path):
    model = load(tmp_path, name)
    dense = copy.deepcopy(model).dequantize()
    ids = inputs_of(name)["input_ids"]

    def generate(one, **more):
        settings = {"max_new_tokens": 6, "pad_token_id": 0, **SEARCHES[search], **more}
        found = one.generate(ids, **settings, output_scores=True, return_dict_in_generate=True)
        return found.sequences, torch.stack(found.scores)

    tokens, scores = generate(model)
    for others in (generate(dense), generate(model, use_cache=False)):
        assert torch.equal(tokens, others[0])
        torch.testing.assert_close(scores, others[1], rtol=1e-4, atol=1e-4)


# ---- compilation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "backend"),
    [("ipq", "eager"), ("ipq", "aot_eager"), ("int8", "aot_eager")],
)
def test_training_compiles_without_graph_break(kind, backend, tmp_path):
    model = load(tmp_path, "bert", CONFIGS[kind])  # in eval mode: without dropout
    inputs = {**inputs_of("bert"), "labels": torch.tensor([0, 1])}

    def gradients(run):
        model.zero_grad()
        run(**inputs).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients(model)
    found = gradients(torch.compile(model, backend=backend, fullgraph=True))
    assert found.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, n=name: f"{n}: {text}")


def test_decoder_compiles_in_inference(tmp_path):
    model = load(tmp_path, "llama")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(output(compiled, "llama"), output(model, "llama"))


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))),
    reason="inductor needs a C++ compiler",
)
def test_inductor_matches_eager(tmp_path):
    model = load(tmp_path, "bert", layers=1)
    inputs = {**inputs_of("bert"), "labels": torch.tensor([0, 1])}
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(output(compiled, "bert"), output(model, "bert"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # the second with other centroids
        found = {}
        for name, run in (("eager", model), ("compiled", compiled)):
            model.zero_grad()
            loss = run(**inputs).loss
            loss.backward()
            found[name] = (
                loss.detach(),
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
            )
        torch.testing.assert_close(found["compiled"], found["eager"], rtol=1e-4, atol=1e-5)
        optimizer.step()


# ---- new tokens, another head --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "size"), [("gpt2", "ipq", 330), ("gpt2", "int8", 300), ("bart", "ipq", 330)]
)
def test_resizing_packed_table_raises_and_changes_nothing(name, kind, size):
    model = quantize_model(make_stacked(name, 1), CONFIGS[kind], progress=False)
    expected = output(model, name)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"resize.*dequantize"):
            model.resize_token_embeddings(size)
    assert model.config.vocab_size == 320 and model.get_input_embeddings().num_embeddings == 320
    assert torch.equal(output(model, name), expected)
    # Scripts also call it with the same size: the same parameters stay trainable.
    trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert model.resize_token_embeddings(320) is model.get_input_embeddings()
    assert {name for name, tensor in model.named_parameters() if tensor.requires_grad} == trained
    assert torch.equal(output(model, name), expected)


def test_dequantize_resize_and_quantize_again(tmp_path):
    model = load(tmp_path / "a", "gpt2").dequantize()
    expected = output(model, "gpt2")
    model.resize_token_embeddings(330)
    torch.testing.assert_close(output(model, "gpt2")[..., :320], expected)
    quantize_model(model, CONFIGS["ipq"], progress=False)
    again = reloaded(model, tmp_path / "b")
    assert torch.equal(output(again, "gpt2"), output(model, "gpt2"))
    assert output(again, "gpt2").shape[-1] == 330


@pytest.mark.parametrize("size", [330, 300])
def test_dense_table_with_tied_head_can_be_resized(size, tmp_path):
    model = load(
        tmp_path / "a", "gpt2", IPQConfig(**PQ, stages=["ffn", "attention"], leftover_bits=16)
    )
    expected = output(model, "gpt2", 300)
    model.resize_token_embeddings(size)
    again = reloaded(model, tmp_path / "b")
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert torch.equal(output(again, "gpt2", 300), output(model, "gpt2", 300))
    found = output(again, "gpt2", 300)
    assert found.shape[-1] == size
    torch.testing.assert_close(found[..., :320], expected[..., :size])


def test_resizing_replaces_packed_head_and_updates_plan(tmp_path):
    model = load(tmp_path / "a", "llama", IPQConfig(**PQ, stages=["ffn", "head"], leftover_bits=16))
    assert "lm_head" in model.config.quantization_config.plan
    expected = output(model, "llama")
    model.resize_token_embeddings(330)
    torch.testing.assert_close(output(model, "llama")[..., :320], expected)
    again = reloaded(model, tmp_path / "b")
    assert torch.equal(output(again, "llama"), output(model, "llama"))
    config = again.config.quantization_config
    assert "lm_head" not in config.plan and "replaced" in config.left_dense["lm_head"]


def test_new_head_is_saved_dense(tmp_path):
    model = load(tmp_path / "a", "bert", CONFIGS["int8"])
    assert "classifier" in model.config.quantization_config.plan
    torch.manual_seed(1)
    model.classifier, model.config.num_labels = nn.Linear(32, 5), 5
    model.num_labels = 5
    again = reloaded(model, tmp_path / "b")
    assert torch.equal(output(again, "bert"), output(model, "bert"))
    assert output(again, "bert").shape[-1] == 5


def test_saving_wrapped_layer_raises(tmp_path):
    model = load(tmp_path / "a", "bert")
    layer = model.bert.encoder.layer[0]
    layer.output.dense = nn.Sequential(layer.output.dense)
    with pytest.raises(ValueError, match=r"layer.0.output.dense.* is a Sequential.*unload"):
        model.save_pretrained(tmp_path / "b")


def test_writing_to_decoded_weight_raises():
    model = quantize_model(make_stacked("bert", 1), CONFIGS["ipq"], progress=False)
    layer = model.bert.encoder.layer[0].output.dense
    expected = layer.weight.clone()
    with torch.no_grad():
        for write in (
            lambda weight: weight.copy_(expected),
            lambda weight: weight.data.add_(1),
            lambda weight: weight.__setitem__(0, 0.0),
            lambda weight: setattr(weight, "data", expected),
            lambda weight: weight.ravel().zero_(),
            lambda weight: weight.swapdims(0, 1).zero_(),
            lambda weight: weight.tensor_split(2)[0].zero_(),
            nn.init.normal_,
        ):
            with pytest.raises(ValueError, match=r"cannot be written to.*dequantize"):
                write(layer.weight)
    with pytest.raises(ValueError, match="cannot be written to"):
        layer.weight = expected + 1
    layer.weight = layer.weight  # as PEFT does when it removes an adapter
    assert torch.equal(layer.weight, expected)
    assert type(layer.weight + 0) is torch.Tensor
    with pytest.raises(ValueError, match="cannot be written to"):
        layer.weight.detach().add_(1)  # a view
