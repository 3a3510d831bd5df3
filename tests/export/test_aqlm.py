"""AQLM checkpoints: loaded by plain transformers in a process that never imports the package."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import VOCABULARY, make_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.quantizers.quantizers_utils import should_convert_module

from hf_quantnoise import FixedPointConfig, IPQConfig, export_aqlm, quantize_model
from hf_quantnoise.export.aqlm import AqlmSetting, _patterns

READER = """
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


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


class Case(NamedTuple):
    make: object
    config: IPQConfig
    setting: AqlmSetting
    layers: int
    dense: str | None = None  # part of the name of a packed layer that is written dense


CASES = {
    "one codebook, float16": Case(
        lambda: make_model("bert"),
        IPQConfig(block_size=4, n_centroids=16, codebook_bits=16),
        AqlmSetting(4, 1, 4),
        12,
        "word_embeddings",
    ),
    "two codebooks, scales, a head": Case(
        tiny_llama,
        IPQConfig(
            block_size=8, n_centroids=13, n_codebooks=2, row_scale=True,
            stages=["ffn", "attention", "head"],
        ),
        AqlmSetting(8, 2, 4),
        4 * 7 + 1,
    ),
    "two settings, shared layers": Case(
        tiny_llama,
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
    "a tied head": Case(
        lambda: make_model("bert-mlm"),
        IPQConfig(block_size=4, n_centroids=16),
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


def read_elsewhere(folders):
    """Loads AQLM folders and runs them on their inputs, in a process of its own."""
    # The numba kernel of aqlm 1.1.7 adds into one vector from several threads without a lock.
    environment = {**os.environ, "NUMBA_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READER, *map(str, folders)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def export(model, folder):
    folder.mkdir(parents=True)
    save_file(inputs_of(model), folder / "inputs.safetensors")
    with torch.no_grad():
        logits = model(**inputs_of(model)).logits
    return export_aqlm(model, folder / "aqlm"), logits


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Every case, exported; with the packed model's logits."""
    root = tmp_path_factory.mktemp("aqlm")
    made = {}
    for number, (name, case) in enumerate(CASES.items()):
        model = quantize_model(case.make(), case.config, progress=False)
        made[name] = (model, *export(model, root / str(number)))
    return made


@pytest.fixture(scope="module")
def reread(exported):
    pytest.importorskip("aqlm", reason="needs the extra 'aqlm'")
    read_elsewhere([done.folder for _, done, _ in exported.values()])
    return {
        name: torch.load(done.folder.parent / "logits.pt")
        for name, (_, done, _) in exported.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_plain_transformers_computes_the_same_logits(exported, reread, name):
    _, _, logits = exported[name]
    torch.testing.assert_close(reread[name], logits, rtol=0, atol=1e-4)
    assert logits.std() > 1e-3  # else the line above would say little


@pytest.mark.parametrize("name", CASES)
def test_what_was_written_how_is_told(exported, name):
    model, done, _ = exported[name]
    case = CASES[name]
    assert done.setting == case.setting
    assert len(done.layers) == case.layers
    packed = set(model.config.quantization_config.plan)
    assert {*done.layers, *done.dense} == packed and not set(done.layers) & set(done.dense)
    assert (case.dense is None) or any(case.dense in name for name in done.dense)
    stored = load_file(done.folder / "model.safetensors")
    for name in done.layers:
        assert stored[f"{name}.codes"].dtype == (
            torch.int8 if done.setting.nbits_per_codebook <= 8 else torch.int16
        )
        assert f"{name}.weight" not in stored
    assert done.disk_bytes == (done.folder / "model.safetensors").stat().st_size
    written = json.loads((done.folder / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "aqlm" and "plan" not in written


def test_the_tensors_decode_to_the_weight_by_aqlm_itself(exported):
    utils = pytest.importorskip("aqlm.utils", reason="needs the extra 'aqlm'")
    for model, done, _ in exported.values():
        stored = load_file(done.folder / "model.safetensors")
        for name in done.layers:
            parts = [stored[f"{name}.{part}"] for part in ("codes", "codebooks", "scales")]
            codes = utils.unpack_int_data(parts[0], done.setting.nbits_per_codebook)
            weight = utils._dequantize_weight(codes, parts[1].float(), parts[2].float())
            torch.testing.assert_close(
                weight, model.get_submodule(name).weight.detach(), rtol=1e-6, atol=1e-6
            )


def test_the_model_is_left_as_it_was(exported):
    for name, (model, _, logits) in exported.items():
        assert model.config.quantization_config.quant_method == "hf_quantnoise", name
        with torch.no_grad():
            assert torch.equal(model(**inputs_of(model)).logits, logits)


def test_a_dense_name_that_ends_an_exported_one_takes_it_along_no_more():
    model = nn.ModuleDict({"dense": nn.Linear(2, 2), "a": nn.ModuleDict({"dense": nn.Identity()})})
    assert not should_convert_module("a.dense", ["dense"])  # the trap
    patterns = _patterns(model, ("a.dense",))
    assert should_convert_module("a.dense", patterns)
    assert not should_convert_module("dense", patterns)


@pytest.mark.parametrize(
    ("make", "config", "words"),
    [
        (lambda: make_model("bert"), None, "BertForSequenceClassification has no packed layer"),
        (
            lambda: make_model("gpt2"),
            IPQConfig(block_size=4, n_centroids=16),
            "(?s)not Conv1D.*IPQConfig\\(block_size=8",
        ),
        (lambda: make_model("bert"), FixedPointConfig(bits=4), "AQLM has no int4"),
        (tiny_t5, IPQConfig(block_size=4, n_centroids=16), "its model reads the weight itself"),
    ],
)
def test_what_fits_nowhere_is_refused_with_what_would_fit(tmp_path, make, config, words):
    model = make()
    if config is not None:
        model = quantize_model(model, config, progress=False)
    with pytest.raises(ValueError, match=words):
        export_aqlm(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rounded_inputs_are_refused(tmp_path, input_ids):
    config = IPQConfig(block_size=4, n_centroids=16, activation_bits=8)
    batches = [{"input_ids": input_ids}]
    model = quantize_model(make_model("bert"), config, calibration_data=batches, progress=False)
    with pytest.raises(ValueError, match="rounded to 8 bits.*activation_bits=None"):
        export_aqlm(model, tmp_path / "out")


@pytest.mark.slow
def test_256_centroids_run_on_aqlm_s_kernel_for_cpus(tmp_path):
    pytest.importorskip("aqlm", reason="needs the extra 'aqlm'")
    pytest.importorskip("numba", reason="aqlm's kernel for 256 centroids on a CPU needs numba")
    config = IPQConfig(
        block_size=4, n_centroids=256, row_scale=True, stages=[".*layer.0.intermediate.*"]
    )
    model = quantize_model(make_model("bert"), config, progress=False)
    done, logits = export(model, tmp_path / "case")
    read_elsewhere([done.folder])
    torch.testing.assert_close(
        torch.load(tmp_path / "case" / "logits.pt"), logits, rtol=0, atol=1e-4
    )
