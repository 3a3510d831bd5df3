"""Replacement of the model in a folder: which files of the old model are removed."""

from pathlib import Path

import pytest

from hf_quantnoise.files.model_folders import replaced_model

OLD = ("config.json", "onnx/model.onnx", "plots/stages.png")


@pytest.mark.parametrize("old", [OLD, ()])
def test_only_the_named_files_of_the_old_model_are_removed(tmp_path, old):
    kept = ("onnx/sub/other.onnx", "notes.txt")
    for name in (*OLD, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    with replaced_model(tmp_path, old) as part:
        (Path(part) / "onnx").mkdir()
        for name in ("config.json", "onnx/model_int8.onnx"):
            (Path(part) / name).write_text("new")
    found = {each.relative_to(tmp_path).as_posix() for each in tmp_path.rglob("*.*")}
    new = {"config.json", "onnx/model_int8.onnx"}
    assert found == new | {*kept} | ({*OLD} - {*old})
    assert (tmp_path / "config.json").read_text() == "new"
    assert (tmp_path / "plots").exists() == (not old)  # an empty folder is removed
