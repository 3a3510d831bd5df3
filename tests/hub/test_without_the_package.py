"""Loading without the package, or with an old one, raises; it never gives random weights."""

import json
import subprocess
import sys

import pytest
from support.stacked import make_stacked
from support.tiny import make_model

from hf_quantnoise import AutoQuantizedModel, FixedPointConfig, IPQConfig, quantize_model
from hf_quantnoise.configuration import QuantizedModelConfig

IPQ = IPQConfig(n_centroids=16)
INT4 = FixedPointConfig(bits=4)
# Each class lacks a part that another has (the head, the decoder), and the sentinel of that part.
CASES = {
    "bert": (INT4, "AutoModel AutoModelForSequenceClassification AutoModelForMaskedLM"),
    "roberta": (INT4, "AutoModel AutoModelForSequenceClassification AutoModelForMaskedLM"),
    "gpt2": (IPQ, "AutoModel AutoModelForCausalLM"),
    "t5": (IPQ, "AutoModel AutoModelForSeq2SeqLM T5EncoderModel"),
}
SHARDED = {"bert", "t5"}  # saved in several files too
STOCK_LOAD = """
import json, sys, transformers
for folder, classes in json.loads(sys.argv[1]).items():
    for name in classes.split():
        try:
            getattr(transformers, name).from_pretrained(folder)
        except RuntimeError as error:
            print("refused", folder, name, error)
assert "hf_quantnoise" not in sys.modules
"""


def test_load_without_package_raises_for_every_class(tmp_path):
    loads = {}
    for name, (config, classes) in CASES.items():
        model = make_stacked("t5") if name == "t5" else make_model(name)
        model = quantize_model(model, config, progress=False)
        folder = tmp_path / name
        model.save_pretrained(folder)
        loads[str(folder)] = classes
        if name in SHARDED:
            shards = tmp_path / f"{name}-shards"
            model.save_pretrained(shards, max_shard_size="8KB")
            assert len(list(shards.glob("model-*.safetensors"))) > 2
            loads[str(shards)] = classes
        info = AutoQuantizedModel.from_pretrained(folder, output_loading_info=True)[1]
        assert not info["unexpected_keys"], "sentinels are not reported"
    run = subprocess.run(
        [sys.executable, "-c", STOCK_LOAD, json.dumps(loads)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    for folder, classes in loads.items():
        for name in classes.split():
            assert f"refused {folder} {name} You set `ignore_mismatched_sizes`" in run.stdout
    assert "got hf_quantnoise" in run.stderr  # the warning above the error names the package


def test_config_names_required_package(tmp_path):
    quantize_model(make_model("bert"), IPQ, progress=False).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["how_to_load"] == (
        "pip install hf-quantnoise, and import hf_quantnoise before loading"
    )
    assert stored["requires"] == "hf-quantnoise>=0.2.0"


def test_newer_format_version_raises(tmp_path):
    quantize_model(make_model("bert"), IPQ, progress=False).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= {
        "format_version": 3,
        "requires": "hf-quantnoise>=0.7.0",
        "scheme": "holographic",
        "hologram": True,
    }
    path.write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"format_version=3.*pip install -U 'hf-quantnoise>=0.7.0'"
    ):
        AutoQuantizedModel.from_pretrained(tmp_path)
    del config["quantization_config"]["requires"]
    with pytest.raises(ValueError, match=r"format_version=3.*pip install -U hf-quantnoise"):
        QuantizedModelConfig.from_dict(config["quantization_config"])
