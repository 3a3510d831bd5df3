"""Files and folders that are complete whenever they exist."""

import json
import os

import pytest

from hf_quantnoise.files.durable import find_defect, has_list, new_file, write_json, write_list


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inside").mkdir()
    for name in ("a.bin", "inside/b.bin"):
        (tmp_path / name).write_bytes(os.urandom(100))
    write_list(str(tmp_path))
    return tmp_path


def test_a_listed_folder_has_no_defect(folder):
    assert has_list(str(folder))
    assert find_defect(str(folder)) is None
    (folder / "later.bin").write_bytes(b"not listed")
    assert find_defect(str(folder)) is None
    write_list(str(folder))  # the list does not list itself
    assert find_defect(str(folder)) is None


@pytest.mark.parametrize("name", ["a.bin", "inside/b.bin"])
def test_every_flipped_byte_is_found(name, folder):
    content = (folder / name).read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        (folder / name).write_bytes(damaged)
        assert find_defect(str(folder)) == name
        assert find_defect(str(folder), checksums=False) is None
    (folder / name).write_bytes(content[:-1])
    assert find_defect(str(folder), checksums=False) == name
    (folder / name).unlink()
    assert find_defect(str(folder), checksums=False) == name


def test_every_flipped_byte_of_the_list_is_found(folder):
    path = folder / "files.json"
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        assert find_defect(str(folder)) is not None, damaged


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null", '{"files": []}', "[" * 100000])
def test_an_invalid_list_is_a_defect(content, folder):
    (folder / "files.json").write_text(content)
    assert find_defect(str(folder)) == "files.json"


def test_an_interrupted_file_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.json"
    write_json({"a": 1}, str(path))
    with pytest.raises(RuntimeError), new_file(str(path)) as part:
        with open(part, "w") as file:
            file.write("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
