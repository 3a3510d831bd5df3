"""``report``: sizes of a folder, without loading its weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import make_model

from hf_quantnoise import (
    AutoQuantizedModel,
    FixedPointConfig,
    IPQConfig,
    quantize_model,
    size_report,
)
from hf_quantnoise.cli.checkpoints import Checkpoint
from hf_quantnoise.cli.sizes import report_of
from hf_quantnoise.compression.reporting.plots import plot_sizes

FEW = {"n_centroids": 16}


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
def test_report_of_a_packed_folder_matches_the_loaded_model(name, config, tmp_path, request):
    quantize_model(make_model(name), config, progress=False).save_pretrained(tmp_path)
    loaded = size_report(AutoQuantizedModel.from_pretrained(tmp_path))
    request.getfixturevalue("no_weights")
    report, note = report_of(Checkpoint(str(tmp_path)))
    assert note is None
    assert {row.name: row for row in report.rows} == {row.name: row for row in loaded.rows}
    assert report.left_dense == loaded.left_dense
    assert report.total == loaded.total
    assert report.total.disk_bytes == (tmp_path / "model.safetensors").stat().st_size


def test_dense_models_are_reported_in_the_dtype_of_the_file(tmp_path, run, no_weights):
    make_model("gpt2").to(torch.bfloat16).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    code, out, _ = run(f"report {tmp_path} --json")
    shown = json.loads(out)
    assert code == 0 and shown["note"] is None
    assert shown["total"]["disk_bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert {row["stored"] for row in shown["rows"]} == {
        "bfloat16",
        "tied to transformer.wte.weight",
    }


def test_unknown_classes_are_reported_by_tensor(tmp_path, run, no_weights):
    model = make_model("bert")
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["architectures"] = ["NoSuchModel"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    code, out, _ = run(f"report {tmp_path} --json")
    shown = json.loads(out)
    assert code == 0 and "NoSuchModel" in shown["note"]
    assert {row["name"] for row in shown["rows"]} == set(model.state_dict())
    assert shown["total"]["disk_bytes"] == (tmp_path / "model.safetensors").stat().st_size
    code, out, err = run(f"report {tmp_path}")
    assert "float32" in out and "note: tensors as stored in the files" in err


def test_configs_that_do_not_match_the_files_are_not_used(tmp_path, run, no_weights):
    make_model("bert").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["num_hidden_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(values))
    shown = json.loads(run(f"report {tmp_path} --json")[1])
    assert "would take" in shown["note"]
    assert shown["total"]["disk_bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert any(row["group"] == "ffn" for row in shown["rows"])


def test_weights_are_loaded_without_safetensors(tmp_path, run):
    model = make_model("bert")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    code, out, err = run(f"report {tmp_path} --json")
    assert code == 0, err
    shown = json.loads(out)
    assert "the weights were loaded" in shown["note"]
    assert shown["total"]["disk_bytes"] == size_report(model).total.disk_bytes


def test_table_by_layer_adds_up(made, run):
    _code, out, _ = run(f"report {made}/out/compressed --per layer")
    rows = [line.split() for line in out.splitlines()]
    shown = [float(row[-2].replace(",", "")) for row in rows if row and row[0].startswith("bert.")
             and row[0].endswith(".weight")]  # fmt: skip
    size = (made / "out" / "compressed" / "model.safetensors").stat().st_size / 1e3
    total = next(row for row in rows if row[:1] == ["total"])
    assert float(total[1].replace(",", "")) == pytest.approx(size, abs=0.06)
    assert 0.5 * size < sum(shown) < size


def cut(path, size):
    with open(path, "r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize("share", [0.5, 0.999, 0.02], ids=["half", "end", "in the header"])
@pytest.mark.parametrize("command", ["report", "push"])
def test_truncated_files_are_an_error(command, share, work, run):
    file = work / "out" / "compressed" / "model.safetensors"
    cut(file, int(share * file.stat().st_size))
    code, out, err = run(f"{command} out/compressed {'me/x' if command == 'push' else ''}")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "model.safetensors" in err and ("truncated" in err or "header" in err)


def test_shards_are_reported_together(tmp_path, run, no_weights):
    model = make_model("bert")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    shown = json.loads(run(f"report {tmp_path} --json")[1])
    assert shown["total"]["disk_bytes"] == pytest.approx(
        sum(shard.stat().st_size for shard in shards), rel=0.01
    )
    assert shown["note"] is None and {row["name"] for row in shown["rows"]} >= set(
        model.state_dict()
    )
    cut(shards[1], shards[1].stat().st_size - 1)
    code, _, err = run(f"report {tmp_path}")
    assert code == 1 and f"{shards[1]} is truncated" in err


def test_models_of_other_packages_have_no_ratio(work, run):
    assert run("convert out/compressed out/aqlm --to aqlm")[0] == 0
    for flags in ("", "--per layer"):
        code, out, err = run(f"report out/aqlm {flags}")
        assert code == 0 and "smaller" not in out and "float32 unknown" in out
        assert err.rstrip().endswith("bytes (quantized by 'aqlm')")
    shown = json.loads(run("report out/aqlm --json")[1])
    assert shown["total"]["times_smaller"] is None and shown["total"]["dense_bytes"] is None
    size = (work / "out" / "aqlm" / "model.safetensors").stat().st_size
    assert shown["total"]["disk_bytes"] == size
    known = {row["name"]: row["dense_bytes"] is not None for row in shown["rows"]}
    assert {name for name in known if not known[name]} == {n for n in known if n.endswith("codes")}


def test_adapters_are_reported_by_tensor(tmp_path, run):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model("bert"), peft.LoraConfig(target_modules=["query"]))
    model.save_pretrained(tmp_path)
    code, out, err = run(f"report {tmp_path} --json")
    assert code == 0, err
    shown = json.loads(out)
    assert f"{str(tmp_path)!r} has no config.json" in shown["note"]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {row["name"]: row["disk_bytes"] for row in shown["rows"]} == {
        name: tensor.nbytes for name, tensor in saved.items()
    }
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert shown["total"]["disk_bytes"] == size


def test_files_without_config_are_reported_by_tensor(work, run):
    """Two files have the same tensor names, and codes are not counted as dense values."""
    folder = work / "out" / "compressed"
    (folder / "config.json").unlink()
    size = (folder / "model.safetensors").stat().st_size
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    shown = json.loads(run("report out/compressed --json")[1])
    assert shown["total"]["disk_bytes"] == 2 * size and shown["header_bytes"] > 0
    assert shown["total"]["times_smaller"] is None
    assert len({row["name"] for row in shown["rows"]}) == len(shown["rows"])
    assert any(row["name"].startswith("b.safetensors:") for row in shown["rows"])


def test_unknown_model_types_are_reported_by_tensor(work, run):
    (work / "out" / "dense" / "config.json").write_text('{"model_type": "nothing_like_it"}')
    code, out, err = run("report out/dense")
    assert code == 0 and "1.0 times smaller" in out
    assert "note: tensors as stored" in err and "nothing_like_it" in err


def test_empty_folders_are_an_error(tmp_path, run):
    code, out, err = run(f"report {tmp_path}")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert f"{str(tmp_path)!r} has no config.json and no *.safetensors" in err


@pytest.mark.parametrize("line", ["report {} --png {}", "plan {} --save {}"])
def test_unwritable_files_are_reported_before_loading(line, made, tmp_path, run, no_weights):
    model = f"{made}/out/{'compressed' if 'report' in line else 'dense'}"
    flag = line.split()[2]
    for file, words in ((tmp_path / "none" / "file", "does not exist"), (tmp_path, "a folder")):
        code, out, err = run(line.format(model, file))
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert f"{flag} {str(file)!r}" in err and words in err


def test_plot_names_each_kind_of_storage(made, tmp_path, run):
    """A plot by layer is taller."""
    image = pytest.importorskip("PIL.Image")
    heights = []
    for per in ("group", "layer"):
        file = tmp_path / f"{per}.png"
        assert run(f"report {made}/out/compressed --per {per} --png {file}")[0] == 0
        with image.open(file) as picture:
            assert picture.format == "PNG" and picture.width > 600
            heights.append(picture.height)
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 10
        report, _ = report_of(Checkpoint(f"{made}/out/compressed"))
        texts = [text.get_text() for text in plot_sizes(report, per, "x").axes[0].texts]
        kinds = {row.stored for row in report.rows if row.disk_bytes > 1}
        assert len(kinds) > 1
        assert all(any(kind in text for text in texts) for kind in kinds)
    assert heights[1] > heights[0]
