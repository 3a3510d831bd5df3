"""Reading checkpoint files: a damaged file raises a ValueError that names the file."""

import json
import os
import shutil
import struct

import pytest
import torch
from golden.make import HERE as GOLDEN
from safetensors.torch import load_file, save_file

from hf_quantnoise import AutoQuantizedModel, IPQConfig
from hf_quantnoise.cli import main
from hf_quantnoise.files.reading import (
    MAX_NAME_LENGTH,
    headers_in,
    read_header,
    read_index,
    read_json,
)
from hf_quantnoise.hub.model_classes import class_of

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def header_file(path, header, data=b"\0" * 8):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)
    return path


HEADERS = {
    "empty": b"",
    "no JSON": b"{'a'",
    "no text": b"\xff\xfe",
    "list": [],
    "number": 1,
    "deep": b"[" * 100_000,
    "key twice": b'{"a": {}, "a": {}}',
    "entry is a list": {"a": [1]},
    "entry is None": {"a": None},
    "no dtype": {"a": {**ENTRY, "dtype": None}},
    "dtype is a list": {"a": {**ENTRY, "dtype": ["F32"]}},
    "dtype to be shown": {"a": {**ENTRY, "dtype": "\x1b[2J"}},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
    "shape is a number": {"a": {**ENTRY, "shape": 2}},
    "negative shape": {"a": {**ENTRY, "shape": [-2]}},
    "bool shape": {"a": {**ENTRY, "shape": [True, 2]}},
    "float shape": {"a": {**ENTRY, "shape": [2.0]}},
    "huge shape": {"a": {**ENTRY, "shape": [2**62] * 50}},
    "other shape": {"a": {**ENTRY, "shape": [3]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [2]}},
    "one offset": {"a": {**ENTRY, "data_offsets": [8]}},
    "text offsets": {"a": {**ENTRY, "data_offsets": ["0", "8"]}},
    "reversed offsets": {"a": {**ENTRY, "data_offsets": [8, 0]}},
    "negative offsets": {"a": {**ENTRY, "data_offsets": [-8, 0]}},
    "offsets past the end": {"a": {**ENTRY, "data_offsets": [8, 16]}},
    "overlap": {"a": ENTRY, "b": ENTRY},
    "unused bytes": {},
    "metadata is a list": {"a": ENTRY, "__metadata__": [1]},
    "metadata with a number": {"a": ENTRY, "__metadata__": {"weights_id": 3}},
    "name to be shown": {"\x1b[2J": ENTRY},
    "long name": {"a" * (MAX_NAME_LENGTH + 1): ENTRY},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_damaged_header_raises_error_that_names_the_file(header, tmp_path, capsys):
    file = header_file(tmp_path / "model.safetensors", header)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or corrupted") as error:
        read_header(file)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < MAX_NAME_LENGTH + 300
    assert main(["report", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "model.safetensors is truncated or corrupted" in err
    assert err.rstrip("\n").isprintable()


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 8, struct.pack("<Q", 2**40)])
def test_damaged_header_length_raises(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or corrupted"):
        read_header(tmp_path / "model.safetensors")


def test_pipe_in_place_of_a_file_raises(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="it has 0 bytes"):
        read_header(tmp_path / "a.safetensors")


def test_header_matches_safetensors(tmp_path):
    tensors = {
        "a": torch.zeros(2, 3),
        "b": torch.zeros(0, 4),
        "scalar": torch.tensor(1.0, dtype=torch.bfloat16),
        "codes": torch.arange(5, dtype=torch.uint8),
        "f8": torch.zeros(2, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    (header,) = headers_in(str(tmp_path)).values()
    assert {name: tensor.shape for name, tensor in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    data = sum(tensor.nbytes for tensor in tensors.values())
    assert header.nbytes == (tmp_path / "x.safetensors").stat().st_size - data


INDEXES = {
    "no JSON": "{",
    "list": [],
    "no map": {"metadata": {}},
    "map is a list": {"weight_map": ["a"]},
    "empty map": {"weight_map": {}},
    "shard is None": {"weight_map": {"a": None}},
    "shard is a list": {"weight_map": {"a": ["model.safetensors"]}},
    "no metadata": {"weight_map": {"a": "a.safetensors"}},
    "metadata is a list": {"metadata": [], "weight_map": {"a": "a.safetensors"}},
    "other type": {"weight_map": {"a": "model.bin"}},
    "outside": {"weight_map": {"a": "../a.safetensors"}},
    "absolute": {"weight_map": {"a": "/a.safetensors"}},
    "other folder": {"weight_map": {"a": "b/a.safetensors"}},
    "to be shown": {"weight_map": {"a": "\x1b[2J.safetensors"}},
}


@pytest.fixture
def sharded(tmp_path):
    """The folder of a packed model in shards."""
    model = AutoQuantizedModel.from_pretrained(GOLDEN / "ipq")
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    return tmp_path


@pytest.mark.parametrize("index", INDEXES.values(), ids=INDEXES)
def test_damaged_index_raises_error_that_names_the_file(index, sharded, capsys):
    file = sharded / "model.safetensors.index.json"
    file.write_text(index if isinstance(index, str) else json.dumps(index))
    wanted = r"model\.safetensors\.index\.json is truncated or corrupted"
    for read in (lambda: read_index(file), lambda: AutoQuantizedModel.from_pretrained(sharded)):
        with pytest.raises(ValueError, match=wanted) as error:
            read()
        assert str(error.value).isprintable()
    assert main(["report", str(sharded)]) == 1
    assert "model.safetensors.index.json is" in capsys.readouterr().err


def test_missing_shard_raises_os_error(sharded, capsys):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        AutoQuantizedModel.from_pretrained(sharded)
    assert main(["report", str(sharded)]) == 1
    assert shard.name in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_damaged_config_raises_error_that_names_the_file(content, tmp_path, capsys):
    shutil.copytree(GOLDEN / "ipq", tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_bytes(content)
    (tmp_path / IPQConfig.file_name).write_bytes(content)
    for name, read in {
        "config.json": lambda: AutoQuantizedModel.from_pretrained(tmp_path),
        IPQConfig.file_name: lambda: IPQConfig.from_pretrained(tmp_path),
    }.items():
        with pytest.raises(ValueError, match=f"{name} is truncated or corrupted"):
            read()
    assert main(["report", str(tmp_path)]) == 0  # by tensor
    assert "config.json is truncated or corrupted" in capsys.readouterr().err


def change(folder, **values):
    """Set values of a copied golden checkpoint's config.json."""
    shutil.copytree(GOLDEN / "ipq", folder, dirs_exist_ok=True)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "x"),
        ("hidden_size", None),
        ("model_type", ["bert"]),
        ("model_type", 1),
        ("dtype", "no_such_dtype"),
        ("quantization_config", []),
        ("quantization_config", 1),
        ("quantization_config", "x"),
        ("quantization_config", {"quant_method": ["hf_quantnoise"]}),
        ("quantization_config", {"quant_method": "\x1b[2J"}),
    ],
)
def test_wrong_values_of_config_raise_value_error(field, value, tmp_path, capsys):
    change(tmp_path, **{field: value})
    with pytest.raises(ValueError) as error:
        AutoQuantizedModel.from_pretrained(tmp_path)
    assert any(word in str(error.value) for word in (str(tmp_path), field, field.replace("_", " ")))
    assert "\x1b" not in str(error.value)
    main(["report", str(tmp_path)])
    assert "\x1b" not in "".join(capsys.readouterr())


NO_MODELS = {
    "a tokenizer": ["AutoTokenizer"],
    "a tokenizer class": ["BertTokenizer"],
    "an auto class": ["AutoModel"],
    "an auto class with a head": ["AutoModelForSequenceClassification"],
    "the base class": ["PreTrainedModel"],
    "a base class": ["BertPreTrainedModel"],
    "a config": ["BertConfig"],
    "a function": ["pipeline"],
    "a module": ["models"],
    "a private name": ["__builtins__"],
    "a string": "BertForSequenceClassification",
    "a number": 1,
    "a list of integers": [1],
    "dicts": [{"BertForSequenceClassification": 1}],
    "a list": [["BertForSequenceClassification"]],
    "nothing": [],
    "none": None,
    "to be shown": ["\x1b[2J"],
}


@pytest.mark.parametrize("architectures", NO_MODELS.values(), ids=NO_MODELS)
def test_only_models_are_loaded(architectures, tmp_path, capsys):
    assert class_of(architectures) is None
    change(tmp_path, architectures=architectures)
    with pytest.raises(ValueError, match="architectures") as error:
        AutoQuantizedModel.from_pretrained(tmp_path)
    assert "\x1b" not in str(error.value)
    assert main(["report", str(tmp_path)]) == 0  # by tensor
    assert "architectures" in capsys.readouterr().err


def test_files_of_golden_checkpoints_are_valid():
    for folder in GOLDEN.iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            read_json(folder / "config.json")
            (header,) = headers_in(str(folder)).values()
            assert header.tensors.keys() == load_file(folder / "model.safetensors").keys()
