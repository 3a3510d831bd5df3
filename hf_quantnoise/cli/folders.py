"""The folder that a command writes, and what goes into it beside the model."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch

from transformers import PreTrainedModel

from ..publishing.push import card_of, merge_cards
from ..repository import CARD, read_card
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
    try:
        with new_folder(out, keep=False):
            pass
    except OSError as error:
        raise ValueError(f"{out!r} cannot be written: {error}; give another folder") from error


def check_file(flag: str, path: str | None) -> None:
    """Whether a file may be written; before the work that it is to hold the result of.

    Raises:
        ValueError: naming the flag, the file and what is in the way.
    """
    if path is None:
        return
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.path.isdir(folder):
        kind = "is a folder" if os.path.isdir(path) else f"lies in {folder!r}, which is not there"
        raise ValueError(f"{flag} {path!r} {kind}; give the name of a file in a folder that is")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise ValueError(f"{flag} {path!r} cannot be written to; give another")


@contextmanager
def new_folder(out: str, keep: bool = True) -> Iterator[str]:
    """A folder to write into, which becomes ``out`` when the block has ended well: whatever was
    there stands until then. With ``keep`` False it is gone then, and ``out`` as it was."""
    parent = os.path.dirname(os.path.abspath(out))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".hf-quantnoise-", dir=parent) as scratch:
        folder = os.path.join(scratch, "model")
        os.mkdir(folder)
        yield folder
        if not keep:
            return
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


# What a card says of the dense model alone.
_OF_THE_DENSE = ("eval_results", "model_name", "metrics", "base_model_relation", "library_name")


def write_card(model: PreTrainedModel, source: str, folder: str) -> None:
    """How to load the packed model and how it is stored, above the words of the dense model's card
    where it has one; of its metadata what was measured of it stays behind."""
    card, path = card_of(model).render(model), os.path.join(source, CARD)
    if os.path.isfile(path):
        theirs = read_card(path)
        of_the_dense = (*_OF_THE_DENSE, *(["base_model"] if card.data.base_model else []))
        for name in of_the_dense:
            setattr(theirs.data, name, None)
        card = merge_cards(card, theirs)
        if card.data.base_model:
            card.data.base_model_relation = "quantized"
    card.save(os.path.join(folder, CARD))
