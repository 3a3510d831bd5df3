"""AQLM export: checkpoints load in transformers, in a process that never imports this package."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.stacked import make_stacked
from support.tiny import VOCABULARY, make_model
from torch import nn

from hf_quantnoise import FixedPointConfig, IPQConfig, export_aqlm, quantize_model
from hf_quantnoise.compat import should_convert_module
from hf_quantnoise.export.aqlm import AqlmSetting, _dense_patterns

LOAD_AND_RUN = """
import sys, torch, transformers
from safetensors.torch import load_file
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    architecture = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model, info = getattr(transformers, architecture).from_pretrained(
        folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    inputs = load_file(f"{folder}/../inputs.safetensors")
    with torch.no_grad():
        logits = model(**inputs).logits
    classes = {type(module).__name__ for module in model.modules()}
    assert "QuantizedLinear" in classes
    torch.save(logits, f"{folder}/../logits.pt")
assert "hf_quantnoise" not in sys.modules
"""


def make_llama():
    return make_stacked("llama", 4)


IPQ = IPQConfig(block_size=4, n_centroids=16)
ROUNDED = IPQConfig(block_size=4, n_centroids=16, activation_bits=8)


class Case(NamedTuple):
    make: object
    config: IPQConfig
    setting: AqlmSetting
    layers: int
    dense: str | None = None  # part of the name of a layer that is written dense


CASES = {
    "one codebook, float16": Case(
        lambda: make_model("bert"),
        IPQConfig(block_size=4, n_centroids=16, codebook_bits=16),
        AqlmSetting(4, 1, 4),
        12,
        "word_embeddings",
    ),
    "two codebooks, row scales, head": Case(
        make_llama,
        IPQConfig(
            block_size=8, n_centroids=13, n_codebooks=2, row_scale=True,
            stages=["ffn", "attention", "head"],
        ),
        AqlmSetting(8, 2, 4),
        4 * 7 + 1,
    ),
    "two settings, shared layers": Case(
        make_llama,
        IPQConfig(
            block_size={"ffn": 8, "attention": 4, "embeddings": 4}, n_centroids=16, codebook_bits=8,
            share_layers=2,
        ),
        AqlmSetting(8, 1, 4),
        4 * 3,
        "self_attn.q_proj",
    ),
    "more than 8 bits": Case(
        lambda: make_model("bert"),
        IPQConfig(block_size=2, n_centroids=300, codebook_bits=16, stages=[".*layer.0.output.*"]),
        AqlmSetting(2, 1, 9),
        1,
    ),
    "tied head": Case(
        lambda: make_model("bert-mlm"),
        IPQ,
        AqlmSetting(4, 1, 4),
        12,
        "predictions.decoder",
    ),
}  # fmt: skip


def inputs_of(model):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, VOCABULARY, (2, 9), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][1, 6:] = 0
    return inputs


def run_without_package(folders):
    """Load exported checkpoints and save their logits, in a separate process."""
    # The numba kernel of aqlm 1.1.7 adds into one vector from several threads without a lock.
    environment = {**os.environ, "NUMBA_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", LOAD_AND_RUN, *map(str, folders)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return [torch.load(folder.parent / "logits.pt") for folder in folders]


def export(model, folder):
    """Return the export of a model, and the logits of the packed model."""
    folder.mkdir(parents=True)
    save_file(inputs_of(model), folder / "inputs.safetensors")
    with torch.no_grad():
        logits = model(**inputs_of(model)).logits
    return export_aqlm(model, folder / "aqlm"), logits


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return the packed model, its export and its logits for every case."""
    root = tmp_path_factory.mktemp("aqlm")
    exports = {}
    for name, case in CASES.items():
        model = quantize_model(case.make(), case.config, progress=False)
        exports[name] = (model, *export(model, root / str(len(exports))))
    return exports


@pytest.fixture(scope="module")
def aqlm_logits(exported):
    """Return the logits that transformers computes with aqlm for every case."""
    pytest.importorskip("aqlm", reason="needs the extra 'aqlm'")
    logits = run_without_package([result.folder for _, result, _ in exported.values()])
    return dict(zip(exported, logits, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_export_aqlm_gives_the_same_logits_in_transformers(exported, aqlm_logits, name):
    _, _, logits = exported[name]
    torch.testing.assert_close(aqlm_logits[name], logits, rtol=0, atol=1e-4)
    assert logits.std() > 1e-3  # otherwise the comparison above would be trivial


@pytest.mark.parametrize("name", CASES)
def test_export_aqlm_reports_what_it_wrote(exported, name):
    model, result, _ = exported[name]
    case = CASES[name]
    assert result.setting == case.setting
    assert len(result.layers) == case.layers
    packed = set(model.config.quantization_config.plan)
    assert {*result.layers, *result.dense} == packed
    assert not set(result.layers) & set(result.dense)
    assert case.dense is None or any(case.dense in name for name in result.dense)
    stored = load_file(result.folder / "model.safetensors")
    dtype = torch.int8 if result.setting.nbits_per_codebook <= 8 else torch.int16
    for name in result.layers:
        assert stored[f"{name}.codes"].dtype == dtype
        assert f"{name}.weight" not in stored
    assert result.disk_bytes == (result.folder / "model.safetensors").stat().st_size
    config = json.loads((result.folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "aqlm" and "plan" not in config


def test_export_aqlm_tensors_decode_to_the_weight_with_aqlm(exported):
    utils = pytest.importorskip("aqlm.utils", reason="needs the extra 'aqlm'")
    for model, result, _ in exported.values():
        stored = load_file(result.folder / "model.safetensors")
        for name in result.layers:
            parts = [stored[f"{name}.{part}"] for part in ("codes", "codebooks", "scales")]
            codes = utils.unpack_int_data(parts[0], result.setting.nbits_per_codebook)
            weight = utils._dequantize_weight(codes, parts[1].float(), parts[2].float())
            expected = model.get_submodule(name).weight.detach()
            torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-6)


def test_export_aqlm_does_not_change_the_model(exported):
    for name, (model, _, logits) in exported.items():
        assert model.config.quantization_config.quant_method == "hf_quantnoise", name
        with torch.no_grad():
            assert torch.equal(model(**inputs_of(model)).logits, logits)


def test_dense_patterns_do_not_match_exported_layers_with_the_same_suffix():
    model = nn.ModuleDict({"dense": nn.Linear(2, 2), "a": nn.ModuleDict({"dense": nn.Identity()})})
    assert not should_convert_module("a.dense", ["dense"])  # the bare name would match both
    patterns = _dense_patterns(model, ("a.dense",))
    assert should_convert_module("a.dense", patterns)
    assert not should_convert_module("dense", patterns)


@pytest.mark.parametrize(
    ("make", "config", "match"),
    [
        (lambda: make_model("bert"), None, "BertForSequenceClassification"),
        (lambda: make_model("gpt2"), IPQ, r"Conv1D.*IPQConfig\(block_size=8"),
        (lambda: make_model("bert"), FixedPointConfig(bits=4), "int4"),
        (lambda: make_stacked("t5", 1), IPQ, "reads the weight"),
        (lambda: make_model("bert"), ROUNDED, "activation_bits=8.*activation_bits=None"),
    ],
    ids=["dense", "Conv1D", "int4", "T5", "activations"],
)
def test_export_aqlm_raises_if_nothing_fits(tmp_path, input_ids, make, config, match):
    model = make()
    if config is not None:
        batches = [{"input_ids": input_ids}] if config.activation_bits else None
        model = quantize_model(model, config, calibration_data=batches, progress=False)
    with pytest.raises(ValueError, match=match):
        export_aqlm(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_export_aqlm_with_256_centroids_runs_on_the_numba_kernel(tmp_path):
    pytest.importorskip("aqlm", reason="needs the extra 'aqlm'")
    pytest.importorskip("numba", reason="aqlm's CPU kernel for 256 centroids needs numba")
    config = IPQConfig(
        block_size=4, n_centroids=256, row_scale=True, stages=[".*layer.0.intermediate.*"]
    )
    model = quantize_model(make_model("bert"), config, progress=False)
    result, logits = export(model, tmp_path / "case")
    (found,) = run_without_package([result.folder])
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)


def test_export_aqlm_refuses_adapters(tmp_path):
    """Only the adapter would be written; one that was deleted leaves layers of other names."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = quantize_model(make_model("bert"), IPQ, progress=False)
    model.add_adapter(peft.LoraConfig(target_modules=["query"], r=4))
    for is_deleted in (False, True):
        if is_deleted:
            model.delete_adapter("default")
        with pytest.raises(ValueError, match=r"export_aqlm: .*has PEFT adapters.*load it again"):
            export_aqlm(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
