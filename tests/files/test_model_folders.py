"""Replacement of the model in a folder: which files of the old model are removed."""

from pathlib import Path

import pytest

from hf_quantnoise.files.model_folders import replaced_model


@pytest.mark.parametrize("keep_others", [True, False])
def test_files_of_the_old_model_in_a_common_folder_are_removed(tmp_path, keep_others):
    (tmp_path / "onnx" / "sub").mkdir(parents=True)
    for name in ("config.json", "onnx/model.onnx", "onnx/sub/old.onnx"):
        (tmp_path / name).write_text("old")
    with replaced_model(tmp_path, keep_others=keep_others) as part:
        (Path(part) / "onnx").mkdir()
        for name in ("config.json", "onnx/model_int8.onnx"):
            (Path(part) / name).write_text("new")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.onnx")}
    old = {"onnx/model.onnx", "onnx/sub/old.onnx"} if keep_others else set()
    assert found == {"onnx/model_int8.onnx"} | old
    assert (tmp_path / "config.json").read_text() == "new"
