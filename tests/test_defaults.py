"""The default settings work on every architecture of the zoo, at every entry point."""

import contextlib
import io

import pytest
import torch
from support.stored import assert_listed, matrices
from support.trainers import make_trainer
from support.zoo import ZOO, rows_of, tensors_of

from hf_quantnoise import (
    CompressionArguments,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseConfig,
    apply_quant_noise,
    quantize_model,
)
from hf_quantnoise.cli import main
from hf_quantnoise.configuration.ipq import DEFAULT_STAGES
from hf_quantnoise.modeling import packed_layers
from hf_quantnoise.modeling.plan import stages_for
from hf_quantnoise.noise import find_state
from hf_quantnoise.structure import find_layers

CONFIGS = {"ipq": IPQConfig, "fixed point": FixedPointConfig}
# One of each kind is compressed in each run of the tests; the others are slow.
FEW = ("BERT", "Mixtral", "Whisper", "ViT", "ResNet", "CLIP")
FEW_THEN_SLOW = [
    pytest.param(name, marks=[] if name in FEW else pytest.mark.slow, id=name) for name in ZOO
]
EXPECTED = {
    "BERT": ["ffn", "embeddings", "attention"],
    "GPT-2": ["ffn", "embeddings", "attention"],
    "Mixtral": ["embeddings", "attention"],  # its experts are bare parameters
    "Mamba": ["ffn", "embeddings", "conv"],
    "Wav2Vec2": ["ffn", "attention", "conv", "head"],
    "ViT": ["ffn", "attention", "conv", "head"],
    "ResNet": ["conv", "head"],
    "MobileNetV2": ["conv", "head"],
}


def test_defaults_of_storage():
    explicit = IPQConfig(block_size=4, codebook_bits=16, leftover_bits=8)
    assert explicit.to_dict() == IPQConfig().to_dict()
    assert FixedPointConfig(leftover_bits=8).to_dict() == FixedPointConfig().to_dict()


@pytest.mark.parametrize("name", EXPECTED)
def test_default_stages_are_the_groups_of_the_model(name):
    assert stages_for(IPQConfig(), ZOO[name].make()) == EXPECTED[name]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ZOO)
def test_quantize_model_with_defaults(name, config):
    model = ZOO[name].make()
    names, groups = matrices(model), {layer.group for layer in find_layers(model)}
    quantize_model(model, CONFIGS[config](), progress=False)
    assert_listed(model, names)
    stored = model.config.quantization_config
    if config == "ipq":
        used = {
            entry["group"] for name, entry in stored.plan.items() if name not in stored.left_dense
        }
        assert stored.stages == [stage for stage in DEFAULT_STAGES if stage in used]
        assert used <= groups
        packs_head = "head" in groups and "conv" in groups
        reasons = {reason.partition(";")[0] for reason in stored.left_dense.values()}
        assert ("its group 'head' is in no stage" in reasons) == (
            "head" in groups and not packs_head
        )
    with torch.no_grad():
        for key, tensor in tensors_of(model.eval()(**ZOO[name].batch())):
            assert not tensor.is_floating_point() or tensor.isfinite().all(), key


@pytest.mark.parametrize("name", ZOO)
def test_apply_quant_noise_with_defaults(name):
    model = apply_quant_noise(ZOO[name].make(), QuantNoiseConfig())
    assert find_state(model).layers
    model.train()(**ZOO[name].batch()).loss.backward()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", FEW_THEN_SLOW)
def test_compress_with_defaults(name, config, tmp_path):
    kind = ZOO[name]
    model, batch = kind.make(), kind.batch()
    names = matrices(model)
    size = next(len(value) for value in batch.values() if isinstance(value, torch.Tensor))
    trainer = make_trainer(tmp_path, model, rows_of(batch), per_device_train_batch_size=size)
    trainer.compress(CONFIGS[config](), CompressionArguments())
    assert_listed(trainer.model, names)


@pytest.mark.parametrize("name", FEW_THEN_SLOW)
def test_command_line_with_defaults(name, tmp_path):
    model = ZOO[name].make()
    model.save_pretrained(tmp_path / "dense")
    for scheme in ("ipq", "fixed_point"):
        with contextlib.redirect_stdout(io.StringIO()) as plan:
            main(["plan", str(tmp_path / "dense"), "--scheme", scheme])
        main(["compress", str(tmp_path / "dense"), str(tmp_path / scheme), "--scheme", scheme])
        bytes_on_disk = (tmp_path / scheme / "model.safetensors").stat().st_size
        assert bytes_on_disk < (tmp_path / "dense" / "model.safetensors").stat().st_size
        assert "total" in plan.getvalue()


# ---- block sizes that do not fit, and stages that are named --------------------------------------


def test_layers_that_the_default_stages_cannot_pack_are_listed():
    model = ZOO["ViT"].make()
    # 192 columns of patches, 32 or 64 of the others: only the patches divide by 3.
    quantize_model(model, IPQConfig(block_size=3, n_centroids=8), progress=False)
    stored = model.config.quantization_config
    assert stored.stages == ["conv"] and len(stored.plan.keys() - stored.left_dense.keys()) == 1
    reasons = {
        reason.partition(";")[0]
        for name, reason in stored.left_dense.items()
        if "attention" in name
    }
    assert reasons == {"block size 3 does not divide its 32 columns"}


@pytest.mark.parametrize("name", ["BERT", "ViT"])
def test_nothing_that_fits_is_an_error(name):
    model = ZOO[name].make()
    with pytest.raises(ValueError, match=r"invalid block_size=7: .*does not divide its .*columns"):
        quantize_model(model, IPQConfig(block_size=7, n_centroids=8), progress=False)
    assert not any(packed_layers(model))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_head_without_labels_is_skipped(config):
    model = ZOO["BERT"].make()
    model.classifier = torch.nn.Linear(model.config.hidden_size, 0)
    quantize_model(model, config(), progress=False)
    assert "no values" in model.config.quantization_config.left_dense["classifier.weight"]


def test_stages_whose_layers_are_all_in_another_one_are_named():
    model = ZOO["ViT"].make()
    expected = r"every layer of 'ffn' is in '\.\*' \(a regex takes precedence.*remove 'ffn'"
    with pytest.raises(ValueError, match=expected):
        quantize_model(model, IPQConfig(stages=["ffn", ".*"]), progress=False)


def test_named_stages_must_exist_and_pack_something():
    model = ZOO["ViT"].make()
    with pytest.raises(ValueError, match="invalid stages: 'embeddings' matches no layer"):
        quantize_model(model, IPQConfig(stages=["ffn", "embeddings"]), progress=False)
    with pytest.raises(ValueError, match="none of the 4 layers of the stage 'ffn'"):
        quantize_model(
            model, IPQConfig(block_size=3, n_centroids=8, stages=["ffn", "conv"]), progress=False
        )


def test_sizes_by_group_must_cover_the_default_stages_except_convolutions_and_head():
    sizes = {"block_size": {"ffn": 8, "attention": 4}, "n_centroids": 8}
    with pytest.raises(
        ValueError, match=r"invalid block_size.*no entry for the stage 'embeddings'"
    ):
        quantize_model(ZOO["BERT"].make(), IPQConfig(**sizes), progress=False)
    model = quantize_model(ZOO["ViT"].make(), IPQConfig(**sizes), progress=False)
    assert model.config.quantization_config.stages == ["ffn", "attention"]


def test_default_stages_have_settings_of_their_own(tmp_path):
    kind = ZOO["ResNet"]
    trainer = make_trainer(tmp_path, kind.make(), rows_of(kind.batch()))
    settings = {"conv": {"steps": 1}, "head": {"epochs": 0}}
    config = IPQConfig(n_centroids=8)
    trainer.compress(config, CompressionArguments(stage_settings=settings))
    assert [record["stage"] for record in trainer.compression_history] == ["dense", "conv", "head"]
    with pytest.raises(ValueError, match=r"unknown stage 'ffn'; .*'conv', 'head'"):
        make_trainer(tmp_path, kind.make(), rows_of(kind.batch())).compress(
            config, CompressionArguments(stage_settings={"ffn": {"steps": 1}})
        )
