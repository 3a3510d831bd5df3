"""``report``: what stands in a folder, without its weights."""

import json

import pytest
import torch
from tiny import make_model

from hf_quantnoise import (
    AutoQuantizedModel,
    FixedPointConfig,
    IPQConfig,
    quantize_model,
    size_report,
)
from hf_quantnoise.cli.checkpoints import Checkpoint
from hf_quantnoise.cli.sizes import report_of

FEW = {"n_centroids": 16}


@pytest.fixture
def no_weights(monkeypatch):
    """Whatever asks for weights fails."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gpt2", IPQConfig(**FEW, codebook_bits=8)),
        ("gpt2", IPQConfig(**FEW, share_layers=2, stages=["embeddings"])),
        ("roberta-mlm", IPQConfig(**FEW, prune_layers="every_other", row_scale=True)),
        ("bert", FixedPointConfig(bits=3, share_layers=2)),
    ],
    ids=["tied", "dense layers shared", "pruned", "packed layers shared"],
)
def test_a_packed_folder_is_reported_as_the_model_in_it(name, config, tmp_path, request):
    quantize_model(make_model(name), config, progress=False).save_pretrained(tmp_path)
    loaded = size_report(AutoQuantizedModel.from_pretrained(tmp_path))
    request.getfixturevalue("no_weights")
    report, note = report_of(Checkpoint(str(tmp_path)))
    assert note is None
    assert {row.name: row for row in report.rows} == {row.name: row for row in loaded.rows}
    assert report.left_dense == loaded.left_dense
    assert report.total == loaded.total
    assert report.total.disk_bytes == (tmp_path / "model.safetensors").stat().st_size


def test_a_dense_model_has_the_type_of_its_file(tmp_path, run, no_weights):
    make_model("gpt2").to(torch.bfloat16).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    code, out, _ = run(f"report {tmp_path} --json")
    told = json.loads(out)
    assert code == 0 and told["note"] is None
    assert told["total"]["disk_bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert {row["stored"] for row in told["rows"]} == {"bfloat16", "tied to transformer.wte.weight"}


def test_files_that_no_class_describes_are_told_tensor_by_tensor(tmp_path, run, no_weights):
    model = make_model("bert")
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["architectures"] = ["NoSuchModel"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    code, out, _ = run(f"report {tmp_path} --json")
    told = json.loads(out)
    assert code == 0 and "NoSuchModel" in told["note"]
    assert {row["name"] for row in told["rows"]} == set(model.state_dict())
    assert told["total"]["disk_bytes"] == (tmp_path / "model.safetensors").stat().st_size
    code, out, err = run(f"report {tmp_path}")
    assert "float32" in out and "note: tensors as they stand in the files" in err


def test_a_config_that_is_not_that_of_the_files_is_not_believed(tmp_path, run, no_weights):
    make_model("bert").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["num_hidden_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(values))
    told = json.loads(run(f"report {tmp_path} --json")[1])
    assert "would take" in told["note"]
    assert told["total"]["disk_bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert any(row["group"] == "ffn" for row in told["rows"])


def test_without_safetensors_the_weights_are_read(tmp_path, run):
    model = make_model("bert")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    code, out, err = run(f"report {tmp_path} --json")
    assert code == 0, err
    told = json.loads(out)
    assert "the weights were read" in told["note"]
    assert told["total"]["disk_bytes"] == size_report(model).total.disk_bytes


def test_the_table_by_layer_adds_up(made, run):
    code, out, _ = run(f"report {made}/out/compressed --per layer")
    rows = [line.split() for line in out.splitlines()]
    shown = [float(row[-2].replace(",", "")) for row in rows if row and row[0].startswith("bert.")
             and row[0].endswith(".weight")]  # fmt: skip
    size = (made / "out" / "compressed" / "model.safetensors").stat().st_size / 1e3
    total = next(row for row in rows if row[:1] == ["total"])
    assert float(total[1].replace(",", "")) == pytest.approx(size, abs=0.06)
    assert 0.5 * size < sum(shown) < size


def test_the_picture(made, tmp_path, run):
    for per in ("group", "layer"):
        file = tmp_path / f"{per}.png"
        assert run(f"report {made}/out/compressed --per {per} --png {file}")[0] == 0
        assert file.read_bytes().startswith(b"\x89PNG")
