"""``--overwrite``: which folders ``compress`` and ``convert`` replace, and which files."""

import json
import os
import shutil

import pytest
from support.tiny import make_model
from support.words import words

from hf_quantnoise.files.model_folders import PART

COMMANDS = ["compress out/dense out/compressed --scheme fixed_point",
            "convert out/packed out/compressed --to dense"]  # fmt: skip


@pytest.fixture
def old(work):
    """A saved model, which the commands replace; their input is next to it."""
    shutil.copytree(work / "out" / "compressed", work / "out" / "packed")
    return work / "out" / "compressed"


def content(folder) -> dict:
    """Return the files and empty subfolders of a folder -> bytes."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else None for name, path in paths.items()}


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("of the user")


@pytest.mark.parametrize("command", COMMANDS)
def test_overwrite_replaces_a_saved_model(command, old, run):
    dropped = ["pytorch_model.bin", "model-00001-of-00002.safetensors", "vocab.txt", "merges.txt",
               "model.safetensors.index.json", "training_args.bin", "generation_config.json",
               "onnx/model.onnx", "plots/stages.png", "model.fp16.safetensors",
               "additional_chat_templates/tools.jinja"]  # fmt: skip
    write(old, *dropped)
    (old / f"{PART}left_by_a_killed_process").mkdir()
    code, _, err = run(f"{command} --overwrite")
    assert code == 0, err
    kept = {"README.md"} if "compress" in command.split()[0] else set()
    expected = {"config.json", "model.safetensors", "tokenizer_config.json"} | kept
    assert {path.name for path in old.iterdir()} == expected
    stored = json.loads((old / "config.json").read_text()).get("quantization_config", {})
    assert stored.get("scheme") == ("fixed_point" if kept else None)


def test_overwrite_replaces_the_code_of_a_model(old, run):
    config = json.loads((old / "config.json").read_text())
    code = {"AutoModel": "me/model--modeling_own.Own", "AutoTokenizer": ["tokens.Slow", None]}
    (old / "config.json").write_text(json.dumps(config | {"auto_map": code}))
    write(old, "modeling_own.py", "helper.py", "train.py")
    (old / "modeling_own.py").write_text("from .helper import X\n")
    code, _, err = run(f"{COMMANDS[0]} --overwrite")
    assert code == 1 and "(train.py)" in err, err
    (old / "train.py").unlink()
    assert run(f"{COMMANDS[0]} --overwrite")[0] == 0
    assert not {"modeling_own.py", "helper.py"} & {path.name for path in old.iterdir()}


FOREIGN = {
    "source": ["src/code.py"],
    "script": ["train.py"],
    "text": ["thesis.tex"],
    "data": ["train.bin"],
    "clone": [".git/HEAD", ".gitattributes"],
    "download": [".cache/huggingface/x"],
    "secrets": [".env"],
    "trainer": ["checkpoint-500/optimizer.pt", "runs/events"],
    "checkpoint": ["optimizer.pt", "trainer_state.json"],
    "graphs": ["onnx/notes.txt"],
    "deep": ["onnx/more/x"],
    "folder": ["tokenizer_data/all.txt"],
    "adapter": ["adapter_model.safetensors"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", FOREIGN)
def test_overwrite_refuses_a_model_among_other_files(command, kind, old, run, no_weights):
    write(old, *FOREIGN[kind])
    before = content(old)
    code, _, err = run(f"{command} --overwrite")
    assert code == 1 and "--overwrite does not delete; move them away or choose another" in err
    for name in FOREIGN[kind]:
        shown = name.removesuffix("/x") if name.startswith("onnx/") else name.partition("/")[0]
        assert shown in err, err
    assert content(old) == before


@pytest.mark.parametrize(
    ("config", "weights", "reason"),
    [
        ({"name": "my project"}, True, "config.json of no model"),
        ([], True, "config.json of no model"),
        (None, True, "config.json of no model"),
        ({"model_type": "bert"}, False, "without weights"),
    ],
    ids=["project", "list", "damaged", "only-config"],
)
def test_overwrite_refuses_what_is_not_a_saved_model(config, weights, reason, old, run):
    text = "{" if config is None else json.dumps(config)
    (old / "config.json").write_text(text)
    if not weights:
        (old / "model.safetensors").unlink()
    before = content(old)
    code, _, err = run(f"{COMMANDS[0]} --overwrite")
    assert code == 1 and reason in err and "--overwrite does not replace" in err, err
    assert content(old) == before


def test_overwrite_refuses_the_current_directory_of_a_project(work, run, monkeypatch):
    write(work, "project/thesis.tex", "project/config.json")
    monkeypatch.chdir(work / "project")
    code, _, err = run(f"compress {work}/out/dense . --scheme fixed_point --overwrite")
    assert code == 1 and "thesis.tex" in err
    assert sorted(os.listdir()) == ["config.json", "thesis.tex"]


def test_overwrite_keeps_linked_folders(old, run):
    write(old.parent / "elsewhere", "model.onnx")
    (old / "onnx").symlink_to(old.parent / "elsewhere")
    code, _, err = run(f"{COMMANDS[0]} --overwrite")
    assert code == 1 and "onnx" in err and (old / "onnx" / "model.onnx").exists()


def test_overwrite_keeps_files_that_appear_while_the_model_is_quantized(old, run, monkeypatch):
    from hf_quantnoise.cli import folders

    real = folders.copy_companions

    def copy(*args):
        write(old, "notes.txt", "results/scores.json")
        return real(*args)

    monkeypatch.setattr(folders, "copy_companions", copy)
    assert run(f"{COMMANDS[0]} --overwrite")[0] == 0
    assert (old / "notes.txt").exists() and (old / "results" / "scores.json").exists()


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_outputs_can_be_overwritten_in_every_format(name, tmp_path, run):
    make_model(name).save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    words().save_pretrained(tmp_path / "dense")
    lines = [f"compress {tmp_path}/dense {tmp_path}/packed --block_size 4 --n_centroids 16"]
    lines += [
        f"convert {tmp_path}/packed {tmp_path}/{to}-model --to {to}" for to in ("dense", "onnx")
    ]
    for line in lines:
        code, _, err = run(line)
        assert code == 0, err
    for line in (lines[0], *(f"{line} --overwrite" for line in lines)):
        code, _, err = run(line)
        assert code == ("--overwrite" not in line), err
