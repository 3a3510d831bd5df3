"""The folder that a command writes, and what goes into it beside the model."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch

from transformers import PreTrainedModel

from ..publishing import write_model_card
from ..repository import CARD
from .checkpoints import Checkpoint

# What tokenizers and processors are saved as.
PROCESSING = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "*.model", "*.tiktoken", "chat_template*", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip


def check_output(out: str, overwrite: bool, source: str) -> None:
    """Whether a folder may be written.

    Raises:
        ValueError: naming the folder and the way out.
    """
    if os.path.isfile(out):
        raise ValueError(f"{out!r} is a file; give a folder")
    held = sorted(os.listdir(out)) if os.path.isdir(out) else []
    if held and os.path.isdir(source) and os.path.samefile(out, source):
        raise ValueError(f"{out!r} is the model itself; give another folder")
    if held and not overwrite:
        raise ValueError(
            f"{out!r} holds something ({', '.join(held[:3])}); give another folder, or --overwrite"
        )
    if held and "config.json" not in held:
        raise ValueError(
            f"{out!r} holds no saved model ({', '.join(held[:3])}), so --overwrite leaves it; give "
            "another folder"
        )


@contextmanager
def new_folder(out: str) -> Iterator[str]:
    """A folder to write into, which becomes ``out`` when the block has ended well: whatever was
    there stands until then."""
    parent = os.path.dirname(os.path.abspath(out))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".hf-quantnoise-", dir=parent) as scratch:
        folder = os.path.join(scratch, "model")
        os.mkdir(folder)
        yield folder
        if os.path.isdir(out):
            shutil.rmtree(out)
        os.replace(folder, out)


def copy_companions(checkpoint: Checkpoint, folder: str) -> str:
    """Copies the files of tokenizer and processor; returns the folder they came from."""
    source = checkpoint.files((*PROCESSING, CARD))
    for name in sorted(os.listdir(source)):
        path = os.path.join(source, name)
        if os.path.isfile(path) and any(fnmatch(name, pattern) for pattern in PROCESSING):
            shutil.copyfile(path, os.path.join(folder, name))
    return source


def copy_card(model: PreTrainedModel, source: str, folder: str) -> None:
    """The card of the dense model, where it has one, headed by how to load the packed one."""
    path = os.path.join(source, CARD)
    if os.path.isfile(path):
        shutil.copyfile(path, os.path.join(folder, CARD))
        write_model_card(model, folder)
