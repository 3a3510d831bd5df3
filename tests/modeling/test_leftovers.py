"""Storage of the layers and tensors that no stage packs (``leftover_bits``)."""

import pytest
import torch
from support.tiny import make_model, make_vision_model
from support.trainers import make_task_trainer

from hf_quantnoise import (
    CompressionArguments,
    FixedPointConfig,
    IPQConfig,
    quantize_model,
    size_report,
)
from hf_quantnoise.cli.checkpoints import Checkpoint
from hf_quantnoise.cli.sizes import report_of
from hf_quantnoise.compression.bit_allocation.size_target import file_bytes
from hf_quantnoise.configuration import QuantizedModelConfig
from hf_quantnoise.modeling import packed_layers

PQ = {"block_size": 8, "n_centroids": 8}
INPUTS = {
    "input_ids": torch.arange(20).view(2, 10),
    "pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
}


def logits_of(model):
    with torch.no_grad():
        return model.eval()(INPUTS[model.main_input_name]).logits


def save_and_load(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (lambda: make_model("bert"), IPQConfig(**PQ, leftover_bits=8)),
        (lambda: make_model("bert"), IPQConfig(**PQ, leftover_bits=16, codebook_bits=8)),
        (lambda: make_model("bert-mlm"), IPQConfig(**PQ, stages=["ffn"], leftover_bits=8)),
        (lambda: make_model("gpt2"), IPQConfig(**PQ, leftover_bits=8)),
        (lambda: make_model("gpt2"), FixedPointConfig(bits=4, leftover_bits=16)),
        (lambda: make_model("bert").bfloat16(), IPQConfig(**PQ, leftover_bits=8)),
        (lambda: make_vision_model("resnet"), IPQConfig(n_centroids=8, leftover_bits=8)),
        (lambda: make_vision_model("efficientnet"), IPQConfig(n_centroids=8, leftover_bits=8)),
    ],
    ids=["bert 8", "bert 16", "mlm ffn", "gpt2", "int4", "bfloat16", "resnet", "efficientnet"],
)
def test_leftovers_save_load_is_bit_equal(make, config, tmp_path):
    model = make()
    predicted = file_bytes(model, config)
    dtypes = {name: buffer.dtype for name, buffer in model.named_buffers()}
    quantize_model(model, config, progress=False)
    expected = logits_of(model)
    loaded = save_and_load(model, tmp_path / "first")
    assert torch.equal(logits_of(loaded), expected)
    loaded.save_pretrained(tmp_path / "second")
    for file in ("model.safetensors", "config.json"):
        first, second = ((tmp_path / name / file).read_bytes() for name in ("first", "second"))
        assert first == second
    size = (tmp_path / "first" / "model.safetensors").stat().st_size
    assert size == predicted == size_report(model).total.disk_bytes
    assert size == size_report(loaded).total.disk_bytes
    stored = {row.stored for row in size_report(loaded).rows}
    assert "float32" not in stored
    if model.main_input_name == "pixel_values":
        assert dtypes.items() <= {n: buffer.dtype for n, buffer in loaded.named_buffers()}.items()


def test_leftover_weights_are_rounded_to_the_nearest_of_256_levels_of_their_row():
    dense = make_model("bert").bert.pooler.dense.weight.detach().double()
    model = quantize_model(make_model("bert"), IPQConfig(**PQ, leftover_bits=8), progress=False)
    name = "bert.pooler.dense"
    config, decoded = model.config.quantization_config, model.bert.pooler.dense.weight.double()
    assert config.plan[name]["scheme"] == "int" and config.plan[name]["bits"] == 8
    assert config.left_dense[name] == "its group 'head' is in no stage; stored as int8 channel"
    steps = (dense.amax(1) - dense.amin(1)) / 255
    # Half a step, and up to half a step more at the ends, since the zero point is rounded.
    assert ((decoded - dense).abs() <= 1.001 * steps[:, None]).all()
    assert ((decoded - dense).abs() / steps[:, None]).mean() < 0.27  # 1/4 if uniform
    assert all(len(row.unique()) <= 256 for row in decoded)


def test_other_tensors_are_the_nearest_float16():
    dense = make_model("bert").state_dict()
    model = quantize_model(make_model("bert"), IPQConfig(**PQ, leftover_bits=16), progress=False)
    others = {name for name, _ in model.named_parameters()} & dense.keys()
    assert "classifier.weight" in others and "bert.embeddings.LayerNorm.weight" in others
    for name in others:
        tensor = model.get_parameter(name)
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, dense[name].half().float()), name


def test_excluded_layers_and_dense_entries_are_unchanged(tmp_path):
    dense = make_model("bert").state_dict()
    config = IPQConfig(
        **PQ, leftover_bits=8, exclude_modules=["classifier"],
        layer_quantizers={"bert.encoder.layer.0.output.dense": {"scheme": "dense"}},
    )  # fmt: skip
    model = quantize_model(make_model("bert"), config, progress=False)
    loaded = save_and_load(model, tmp_path)
    for layer in ("classifier", "bert.encoder.layer.0.output.dense"):
        for name in (f"{layer}.weight", f"{layer}.bias"):
            assert torch.equal(loaded.get_parameter(name), dense[name]), name
    assert "bert.pooler.dense" in loaded.config.quantization_config.plan


def test_what_float16_cannot_hold_stays_and_is_listed(tmp_path):
    model = make_model("bert")
    with torch.no_grad():
        model.classifier.bias[0] = 1e5
    quantize_model(model, IPQConfig(**PQ, leftover_bits=8), progress=False)
    loaded = save_and_load(model, tmp_path)
    assert loaded.classifier.bias[0] == 1e5
    assert "float16" in loaded.config.quantization_config.left_dense["classifier.bias"]


def test_training_after_loading_is_saved_without_loss(tmp_path):
    model = make_model("bert")
    quantize_model(model, IPQConfig(**PQ, leftover_bits=8), progress=False)
    loaded = save_and_load(model, tmp_path / "first")
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded.train()(INPUTS["input_ids"], labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    again = save_and_load(loaded, tmp_path / "second")
    assert torch.equal(again.classifier.bias, loaded.classifier.bias)
    assert torch.equal(logits_of(again), logits_of(loaded))
    size = (tmp_path / "second" / "model.safetensors").stat().st_size
    assert size == size_report(again).total.disk_bytes == size_report(loaded).total.disk_bytes
    for folder in (tmp_path / "first", tmp_path / "second"):  # of headers alone
        report, note = report_of(Checkpoint(str(folder), None, False))
        assert note is None
        assert report.total.disk_bytes == (folder / "model.safetensors").stat().st_size


def test_saved_configs_without_the_field_mean_32_bits():
    settings = {
        "a": {"scheme": "pq", "block_size": 8},
        "b": {"scheme": "additive", "codebook_bits": 8},
        "c": {"scheme": "int", "bits": 4},
    }
    saved = IPQConfig(layer_quantizers=settings, codebook_bits=16).to_dict()
    again = QuantizedModelConfig.from_dict(saved)
    assert again.leftover_bits == 8 and again.layer_quantizers == settings
    del saved["leftover_bits"]  # as in files of earlier releases
    old = QuantizedModelConfig.from_dict(saved)
    assert old.leftover_bits == 32 and old.codebook_bits == 16
    settings["a"]["codebook_bits"] = 32
    assert old.layer_quantizers == settings
    assert QuantizedModelConfig.from_dict(old.to_dict()).to_dict() == old.to_dict()


def test_layer_quantizers_have_the_centroid_bits_of_the_config():
    layer, other = (f"bert.encoder.layer.{number}.output.dense" for number in (0, 1))
    own = {"scheme": "pq", "block_size": 8, "n_centroids": 8}
    by_name = {layer: own, other: {**own, "codebook_bits": 32}}
    for bits in (16, 8):
        config = IPQConfig(**PQ, codebook_bits=bits, layer_quantizers=by_name)
        model = quantize_model(make_model("bert"), config, progress=False)
        plan = model.config.quantization_config.plan
        assert plan[layer]["codebook_bits"] == bits and plan[other]["codebook_bits"] == 32


def test_a_plan_with_leftovers_can_be_used_as_layer_quantizers():
    model = quantize_model(make_model("bert"), IPQConfig(**PQ), progress=False)
    plan = model.config.quantization_config.plan
    for bits in (8, 32):
        config = IPQConfig(**PQ, layer_quantizers=plan, leftover_bits=bits)
        again = quantize_model(make_model("bert"), config, progress=False)
        assert again.config.quantization_config.plan == plan
        assert torch.equal(again.bert.pooler.dense.weight, model.bert.pooler.dense.weight)


def test_optimizers_do_not_move_int8_leftovers(tmp_path):
    """A step of 0.001 is larger than the distance between two levels of the pooler."""
    config = IPQConfig(**PQ)
    loaded = save_and_load(quantize_model(make_model("bert"), config, progress=False), tmp_path)
    weight = loaded.bert.pooler.dense.weight.clone()
    loaded.requires_grad_(True).train()(
        INPUTS["input_ids"], labels=torch.tensor([0, 1])
    ).loss.backward()
    torch.optim.AdamW(loaded.parameters(), lr=1e-3).step()
    assert torch.equal(loaded.bert.pooler.dense.weight, weight)
    dense = loaded.dequantize()
    assert dense.bert.pooler.dense.weight.requires_grad
    assert torch.equal(dense.bert.pooler.dense.weight, weight)


def test_frozen_leftovers_stay_frozen():
    model = make_model("bert")
    model.bert.pooler.requires_grad_(False)
    dense = quantize_model(model, IPQConfig(**PQ), progress=False).dequantize()
    assert not dense.bert.pooler.dense.weight.requires_grad
    assert dense.classifier.weight.requires_grad


def test_invalid_leftover_bits_raises():
    with pytest.raises(ValueError, match=r"invalid leftover_bits=4: expected one of 32, 16, 8"):
        IPQConfig(leftover_bits=4)


def test_leftovers_are_trained_in_all_stages_and_packed_after_the_last(tmp_path):
    trainer = make_task_trainer(tmp_path, save_strategy="epoch")
    before = trainer.model.state_dict()["bert.pooler.dense.weight"].clone()
    config = IPQConfig(**PQ, stages=["ffn", "attention"], leftover_bits=8)
    trainer.compress(config, CompressionArguments(stage_epochs=1))
    model, plan = trainer.model, trainer.model.config.quantization_config.plan
    assert plan["bert.pooler.dense"]["scheme"] == "int"
    packed = {name for name, _ in packed_layers(model)}
    assert packed == plan.keys() and "bert.embeddings.word_embeddings" in packed
    moved = (model.bert.pooler.dense.weight - before).abs().max()
    assert moved > (before.amax(1) - before.amin(1)).max() / 255  # more than rounding
    resumed = make_task_trainer(tmp_path, save_strategy="epoch")
    resumed.compress(config, CompressionArguments(stage_epochs=1), resume_from_checkpoint=True)
    assert torch.equal(logits_of(resumed.model), logits_of(model))
    assert resumed.model.config.quantization_config.left_dense == (
        model.config.quantization_config.left_dense
    )
