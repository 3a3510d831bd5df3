"""``plan``, ``compress`` and ``convert``: plans are exact, and outputs complete."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from support.tiny import make_model
from transformers import AutoModelForSequenceClassification

from hf_quantnoise import AutoQuantizedModel
from hf_quantnoise.cli.convert import TARGETS


def size_of(folder) -> int:
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("name", "dtype", "flags"),
    [
        ("gpt2", torch.float32, "--n_centroids 16 --codebook_bits 8"),
        ("bert", torch.bfloat16, "--n_centroids 16 --row_scale --exclude_modules '[\"query\"]'"),
        ("bert", torch.float32, "--scheme fixed_point --bits 3 --share_layers 2"),
        ("roberta-mlm", torch.float32, "--n_centroids 16 --prune_layers every_other"),
        ("bert", torch.float32, "--target_size_mb 0.05 --kmeans_iter 1 --stages ffn embeddings"),
    ],
    ids=["tied", "bfloat16", "shared", "pruned", "target"],
)
def test_plan_matches_the_file_to_the_byte(name, dtype, flags, tmp_path, run):
    make_model(name).to(dtype).save_pretrained(tmp_path / "dense")
    code, out, err = run(f"plan {tmp_path}/dense {flags} --json --save {tmp_path}/plan.json")
    assert code == 0, err
    planned = json.loads(out)
    code, _, err = run(f"compress {tmp_path}/dense {tmp_path}/small {flags}")
    assert code == 0, err
    assert planned["total"]["disk_bytes"] == size_of(tmp_path / "small")
    made = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert planned["left_dense"] == made["left_dense"]
    # The saved plan gives the same file.
    code, _, err = run(f"compress {tmp_path}/dense {tmp_path}/again --config {tmp_path}/plan.json")
    assert code == 0, err
    files = [tmp_path / folder / "model.safetensors" for folder in ("small", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_saved_plans_can_be_used_as_layer_quantizers(work, run):
    run("plan out/dense --codebook_bits 16 --save plan.json")
    values = json.loads((work / "plan.json").read_text())
    layer = next(iter(values["layer_quantizers"]))
    values["layer_quantizers"][layer] = {"scheme": "int", "bits": 2}
    (work / "plan.json").write_text(json.dumps(values))
    plans = [
        json.loads(run(f"plan out/dense --{flag} plan.json --json")[1])
        for flag in ("config", "layer_quantizers")
    ]
    assert plans[0]["rows"] == plans[1]["rows"]
    assert next(r for r in plans[0]["rows"] if r["name"] == f"{layer}.weight")["stored"] == "int2"


def test_plan_loads_no_weights(made, run, no_weights):
    assert run(f"plan {made}/out/dense")[0] == 0


def test_compressed_models_have_tokenizer_and_card(made):
    small = made / "out" / "compressed"
    assert sorted(path.name for path in small.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "tokenizer_config.json",
    ]  # fmt: skip
    assert json.loads((small / "tokenizer_config.json").read_text()) == {"made": "by hand"}
    card = (small / "README.md").read_text()
    assert card.index("license: mit") < card.index("import hf_quantnoise") < card.index("# A model")
    assert not list((made / "out").glob(".hf-quantnoise-*"))


def test_unwritable_folders_are_reported_before_loading(work, run, no_weights):
    code, _, err = run("compress out/dense out/dense/config.json/new")
    assert code == 1 and "cannot be written" in err, err


RESULTS = """---
base_model: me/base
base_model_relation: finetune
library_name: sentence-transformers
license: mit
model-index:
- name: dense
  results:
  - task: {type: text-classification}
    dataset: {type: d, name: d}
    metrics: [{type: accuracy, value: 0.9}]
---
# Words
"""


def test_invalid_card_template_is_refused_before_the_model_is_loaded(work, run, no_weights):
    (work / "mine.md").write_text("---\n{{ card_data }}\n---\nMine: {{ titel }}")
    code, _, err = run("compress out/dense out/new --card_template mine.md")
    assert code == 1 and "unknown variable 'titel'" in err and not (work / "out" / "new").exists()


def test_invalid_dense_card_is_refused_before_the_model_is_loaded(work, run, no_weights):
    (work / "out" / "dense" / "README.md").write_text("---\nlicense: [mit\n---\n")
    code, _, err = run("compress out/dense out/new")
    assert code == 1 and "invalid model card 'out/dense/README.md'" in err
    assert not (work / "out" / "new").exists()


@pytest.mark.parametrize("dense_card", [True, False])
def test_card_has_no_results_of_the_dense_model(dense_card, work, run):
    card = work / "out" / "dense" / "README.md"
    card.write_text(RESULTS) if dense_card else card.unlink()
    assert run("compress out/dense out/new --scheme fixed_point")[0] == 0
    written = ModelCard.load(work / "out" / "new" / "README.md")
    assert "import hf_quantnoise" in written.text and ("# Words" in written.text) == dense_card
    data = written.data.to_dict()
    assert "model-index" not in data and data["library_name"] == "hf-quantnoise"
    assert "quant-noise" in data["tags"]
    expected = ("me/base", "quantized", "mit") if dense_card else (None, None, None)
    assert tuple(map(data.get, ("base_model", "base_model_relation", "license"))) == expected


@pytest.mark.parametrize("command", ["compress", "convert --to dense"])
@pytest.mark.parametrize("inner", ["checkpoint-10", "runs/last"])
def test_overwrite_keeps_the_model_that_is_read(work, run, no_weights, command, inner):
    source = "compressed" if "convert" in command else "dense"
    outer = work / "outer"
    shutil.copytree(work / "out" / source, outer)
    shutil.copytree(work / "out" / source, outer / inner)
    before = size_of(outer)
    code, _, err = run(f"{command} outer/{inner} outer --overwrite")
    assert code == 1 and "'outer' is the model itself, or contains it" in err
    assert size_of(outer) == before


def test_failures_do_not_change_the_output_folder(work, run, monkeypatch):
    before = size_of(work / "out" / "compressed")

    def fail(*args, **kwargs):
        raise RuntimeError("disk full")

    monkeypatch.setattr("hf_quantnoise.cli.folders.copy_companions", fail)
    code, _, err = run("compress out/dense out/compressed --scheme fixed_point --overwrite")
    assert code == 1 and "RuntimeError: disk full" in err
    assert size_of(work / "out" / "compressed") == before
    assert sorted(path.name for path in (work / "out").iterdir()) == ["compressed", "dense"]


def test_missing_weights_are_an_error(tmp_path, run):
    make_model("bert").bert.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["architectures"] = ["BertForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    code, _, err = run(f"compress {tmp_path} {tmp_path}/out --scheme fixed_point")
    assert code == 1 and "lacks 2 weights" in err and "classifier.weight" in err


def test_convert_to_dense_gives_a_regular_model(work, run, input_ids):
    assert run("convert out/compressed out/plain --to dense")[0] == 0
    plain = AutoModelForSequenceClassification.from_pretrained(work / "out" / "plain")
    packed = AutoQuantizedModel.from_pretrained(work / "out" / "compressed")
    assert "quantization_config" not in json.loads((work / "out/plain/config.json").read_text())
    assert (work / "out" / "plain" / "tokenizer_config.json").is_file()
    dense = AutoModelForSequenceClassification.from_pretrained(work / "out" / "dense")
    assert set(plain.state_dict()) == set(dense.state_dict())
    with torch.no_grad():
        assert torch.equal(plain(input_ids).logits, packed.dequantize()(input_ids).logits)


def test_export_lists_dense_layers(work, run):
    code, out, _ = run("convert out/compressed out/aqlm --to aqlm")
    assert code == 0 and "bert.embeddings.word_embeddings: dense, " in out
    values = json.loads((work / "out" / "aqlm" / "config.json").read_text())
    assert values["quantization_config"]["quant_method"] == "aqlm"
    names = load_file(work / "out" / "aqlm" / "model.safetensors").keys()
    assert any(name.endswith(".codes") for name in names)
    assert (work / "out" / "aqlm" / "tokenizer_config.json").is_file()


def test_formats_can_be_registered(work, run):
    @TARGETS.register("listing")
    def listing(model, folder):
        """the names of its tensors"""
        with open(f"{folder}/names.txt", "w") as file:
            file.write("\n".join(model.state_dict()))

    try:
        assert "listing: the names of its tensors" in " ".join(run("convert --help")[1].split())
        assert run("convert out/compressed out/list --to listing")[0] == 0
        assert "weight_indices" in (work / "out" / "list" / "names.txt").read_text()
    finally:
        del TARGETS._entries["listing"]


def test_convert_prints_the_file_and_its_size(work, run):
    code, out, err = run("convert out/compressed out/plain --to dense")
    size = size_of(work / "out" / "plain") / 1e6
    assert code == 0, err
    file = f"out/plain/model.safetensors ({size:.3f} MB)"
    assert out.splitlines()[-1] == f"out/compressed written as 'dense' to {file}"
