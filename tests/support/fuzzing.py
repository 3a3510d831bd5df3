"""Mutants of saved models: changed JSON, headers and tensors, and what may become of them."""

import copy
import json
import operator
import os
import resource
import shutil
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, reduce
from pathlib import Path
from typing import Any

import torch
from golden.make import EXPECTED, HERE
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import PreTrainedModel

from hf_quantnoise import AutoQuantizedModel, FixedPointConfig, IPQConfig
from hf_quantnoise.cli import main
from hf_quantnoise.configuration.options import options_of

# Examples per target and kind of storage: few in `make test`, always the same; more, and other
# ones, in `make fuzz`.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
fuzz = settings(
    max_examples=EXAMPLES or 6,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)

MAX_SECONDS = 10
# Memory beyond twice the files: what the interpreter and torch allocate for any model.
SPARE_BYTES = 64 * 2**20
SPARE_ADDRESSES = 512 * 2**20

HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 8, 16, 2**31, 10**10, 2**64, -(2**63), 10**400, 0.5, 4.0,
    1e300, float("inf"), float("nan"), "", "x", "I32", "\x1b[2J", "\u202e", "a" * 2_000, "(" * 500,
    [], {}, [[]], [1], ["x"], {"x": 1}, {"x": "y"}, reduce(lambda inner, _: [inner], range(500), 0),
]  # fmt: skip
NAMES = ["", "x", "scheme", "plan", "bert", "\x1b[2J", "a" * 2_000, "__class__", "."]


def paths_in(tree: Any, start: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every value in a JSON tree but the root."""
    keys = tree.items() if isinstance(tree, dict) else enumerate(tree) if type(tree) is list else ()
    for key, value in keys:
        yield (*start, key)
        yield from paths_in(value, (*start, key))


def value_at(tree: Any, path: tuple) -> Any:
    return reduce(operator.getitem, path, tree)


@st.composite
def mutated(draw: Any, tree: dict) -> dict:
    """A JSON object with one or two values deleted, replaced, copied, renamed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 2))):
        paths = list(paths_in(tree))
        if not paths:
            break
        *parents, key = draw(st.sampled_from(paths))
        owner = value_at(tree, parents)
        match draw(st.sampled_from(["delete", "replace", "copy", "rename", "add"])):
            case "delete":
                del owner[key]
            case "replace":
                owner[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
            case "copy":
                owner[key] = copy.deepcopy(value_at(tree, draw(st.sampled_from(paths))))
            case "rename" if isinstance(owner, dict):
                name = draw(st.sampled_from([*NAMES, *(p[-1] for p in paths if p[-1] != key)]))
                owner[str(name)] = owner.pop(key)
            case _ if isinstance(owner, dict):
                owner[draw(st.sampled_from(NAMES))] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
            case _:
                owner.append(copy.deepcopy(draw(st.sampled_from(HOSTILE))))
    return tree


@st.composite
def mutated_bytes(draw: Any, content: bytes) -> bytes:
    """Bytes with some of them changed, removed or repeated."""
    start = draw(st.integers(0, max(0, len(content) - 1)))
    end = min(len(content), start + draw(st.integers(1, 64)))
    new = draw(
        st.one_of(
            st.binary(min_size=1, max_size=8),
            st.just(b""),
            st.just(content[start:end] * 2),
            st.sampled_from([b"\0" * 8, b"\xff" * 8, b'"', b"{", b"]", b"9" * 20, b"-1", b"1e9"]),
        )
    )
    return content[:start] + new + content[end:]


def header_of(file: Path) -> tuple[dict, bytes]:
    """Return the header of a safetensors file, and the bytes after it."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(file: Path, header: bytes, body: bytes, length: int | None = None) -> None:
    """Write a safetensors file; ``length`` is another length than that of the header."""
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + body)


class Original:
    """A golden checkpoint, its inputs, and the logits that a right mutant has, too."""

    def __init__(self, name: str, folder: Path | None = None) -> None:
        self.folder = folder or HERE / name
        self.inputs = load_file(HERE / name / EXPECTED)
        del self.inputs["logits"]
        self.config = json.loads((self.folder / "config.json").read_text())
        self.logits = self.run(AutoQuantizedModel.from_pretrained(self.folder))
        self.words = {
            *(str(part) for path in paths_in(self.config) for part in path),
            *options_of(IPQConfig),
            *options_of(FixedPointConfig),
        } - {""}

    def copy(self, folder: Path) -> Path:
        """Return a copy of the folder, in place of an earlier one."""
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(self.folder, folder))

    @torch.no_grad()
    def run(self, model: PreTrainedModel) -> torch.Tensor:
        return model(**self.inputs).logits

    def load(self, folder: Path) -> PreTrainedModel | None:
        """Load a mutant; None after an error, which must be one that names a file or a field."""
        nbytes = sum(file.stat().st_size for file in folder.iterdir())
        try:
            with bounded(nbytes):
                return AutoQuantizedModel.from_pretrained(folder)
        except (ValueError, OSError) as error:
            message = str(error)
        assert any(word in message for word in (str(folder), *self.words)), message
        assert message.replace("\n", "").isprintable(), message
        return None

    def check(self, folder: Path) -> None:
        """Check that a mutant is an error, or a model with the same logits."""
        model = self.load(folder)
        assert model is None or torch.equal(self.run(model), self.logits)


original = cache(Original)


@contextmanager
def bounded(nbytes: int) -> Iterator[None]:
    """Limit the time and the memory of a block, for files of some size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2 * nbytes + SPARE_ADDRESSES
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - start < MAX_SECONDS
    growth = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - highest)
    assert growth < 2 * nbytes + SPARE_BYTES


def check_report(folder: Path, capsys: Any) -> None:
    """Check that ``report`` shows a mutant, or an error that it expects."""
    nbytes = sum(file.stat().st_size for file in folder.iterdir())
    capsys.readouterr()
    with bounded(nbytes):
        code = main(["report", str(folder)])
    out, err = capsys.readouterr()
    assert code in (0, 1), err
    assert all(line.isprintable() for line in (out + err).split("\n")), err
    assert "Error:" not in err, err  # of a type that is not expected
