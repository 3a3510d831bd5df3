"""Layers that are frozen (``requires_grad=False``) stay frozen, packed and unpacked."""

import copy

import pytest
import torch
from support.tiny import make_model
from support.trainers import Killed, make_trainer

from hf_quantnoise import CompressionArguments, FixedPointConfig, IPQConfig, quantize_model
from hf_quantnoise.compression.training.stage_trainer import StageTrainer
from hf_quantnoise.modeling import packed_layers

IPQ = {"block_size": 4, "n_centroids": 16, "kmeans_iter": 2}
CONFIGS = {
    "pq": IPQConfig(**IPQ),
    "pq 8-bit": IPQConfig(**IPQ, codebook_bits=8),
    "row scale": IPQConfig(**IPQ, row_scale=True, codebook_bits=16),
    "additive": IPQConfig(**IPQ, n_codebooks=2),
    "int4": FixedPointConfig(bits=4),
    "int8 channel": FixedPointConfig(observer="channel", activation_bits=8),
}
BATCH = {"input_ids": torch.randint(5, 320, (2, 9), generator=torch.Generator().manual_seed(0))}
FROZEN = {  # layer -> what of it is frozen
    "bert.embeddings.word_embeddings": ("weight",),
    "bert.encoder.layer.0.attention.self.query": ("weight", "bias"),
    "bert.encoder.layer.1.output.dense": ("bias",),
    "bert.encoder.layer.1.intermediate.dense": ("weight",),
}


def frozen_model(name="bert-mlm"):
    model = make_model(name)
    for layer, names in FROZEN.items():
        for name in names:
            model.get_submodule(layer).get_parameter(name).requires_grad = False
    return model


def is_frozen(layer) -> tuple[bool, bool]:
    """Return whether weight and bias of a layer get no gradient, packed or not."""
    weight = [p for name, p in layer.named_parameters() if name.startswith("weight")]
    bias = getattr(layer, "bias", None)
    return not any(p.requires_grad for p in weight), bias is not None and not bias.requires_grad


def assert_frozen(model):
    for name, layer in model.named_modules():
        if name.startswith("bert.enc") and hasattr(layer, "bias") and hasattr(layer, "weight"):
            names = FROZEN.get(name, ())
            assert is_frozen(layer) == ("weight" in names, "bias" in names), name
    assert is_frozen(model.bert.embeddings.word_embeddings)[0]


@pytest.mark.parametrize("config", CONFIGS)
def test_frozen_layers_stay_frozen_when_packed_trained_and_unpacked(config):
    model = frozen_model()
    quantize_model(model, copy.deepcopy(CONFIGS[config]), False, [BATCH])
    assert_frozen(model)
    # The tied head shares the frozen table.
    assert (
        model.cls.predictions.decoder.state.keys() and is_frozen(model.cls.predictions.decoder)[0]
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    optimizer.step()
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    for layer, names in FROZEN.items():
        found = {name.removeprefix(f"{layer}.").split("_")[0] for name in changed if layer in name}
        assert found.isdisjoint(names), layer
    assert any("layer.0.output.dense.weight" in name for name in changed)
    assert_frozen(model.dequantize())


def compressed(folder, data, killed=None, monkeypatch=None):
    trainer = make_trainer(folder, frozen_model("bert"), data, save_strategy="steps", save_steps=1)
    config = IPQConfig(**IPQ, stages=["ffn", "embeddings", "attention"])
    args = CompressionArguments(stage_steps=1, stage_learning_rate=0.1)
    if killed is not None:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            real, calls = StageTrainer.train, []

            def train(self, *args, **kwargs):
                calls.append(None)
                if len(calls) == killed:
                    raise Killed
                return real(self, *args, **kwargs)

            patch.setattr(StageTrainer, "train", train)
            trainer.compress(config, args)
        return compressed_again(folder, data, config, args)
    return trainer.compress(config, args)


def compressed_again(folder, data, config, args):
    trainer = make_trainer(folder, frozen_model("bert"), data, save_strategy="steps", save_steps=1)
    return trainer.compress(config, args, resume_from_checkpoint=True)


def test_stages_do_not_train_frozen_layers(tmp_path, parity_data, monkeypatch):
    model = compressed(tmp_path / "a", parity_data)
    assert_frozen(model)
    once = quantize_model(frozen_model("bert"), IPQConfig(**IPQ), False)
    # The first and second stage are not changed by training, as their weights are frozen.
    name = "bert.encoder.layer.1.intermediate.dense"
    for layer in (name, "bert.embeddings.word_embeddings"):
        found, expected = model.get_submodule(layer), once.get_submodule(layer)
        assert torch.equal(found.weight_codebook, expected.weight_codebook), layer
    other = "bert.encoder.layer.0.intermediate.dense"
    trained, expected = model.get_submodule(other), once.get_submodule(other)
    assert not torch.equal(trained.weight_codebook, expected.weight_codebook)
    resumed = compressed(tmp_path / "b", parity_data, 2, monkeypatch)
    assert_frozen(resumed)
    assert {n for n, _ in packed_layers(resumed)} == {n for n, _ in packed_layers(model)}
    for key, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
