"""The output folder of a command, and the files that are copied next to the model."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..files.durable import path_within
from ..files.model_folders import PART, finish_interrupted
from ..hub.processing import PROCESSING, copy_processing, processing_files, warn_unknown
from ..publishing.push import card_of, merge_cards
from ..repository import CARD, card_in
from .checkpoints import Checkpoint
from .saved_model import saved_entries


def check_output(out: str, overwrite: bool, source: str) -> list[str]:
    """Return the entries of the model in the output folder, which the new model replaces.

    Raise a ``ValueError`` if the folder must not or cannot be written.
    """
    if os.path.isfile(out):
        raise ValueError(f"output {out!r} is a file; choose a folder")
    if overwrite:
        finish_interrupted(out)
    names = sorted({*os.listdir(out)} - {PART}) if os.path.isdir(out) else []
    if CONFIG_NAME in names and os.path.isdir(source) and path_within(out, source):
        raise ValueError(
            f"output folder {out!r} is the model itself, or contains it; choose another"
        )
    if names and not overwrite:
        raise ValueError(
            f"output folder {out!r} is not empty ({', '.join(names[:3])}); choose another or pass "
            "--overwrite"
        )
    try:
        old = saved_entries(out) if names else []
        _require_writable(out)
    except OSError as error:
        raise ValueError(
            f"output folder {out!r} cannot be written ({error}); choose another"
        ) from error
    return old


def _require_writable(out: str) -> None:
    """Raise OSError if files cannot be created in a folder, which may not exist."""
    existed = os.path.isdir(out)
    os.makedirs(out, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=PART, dir=out):
        pass
    if not existed:
        os.rmdir(out)


def copy_companions(checkpoint: Checkpoint, folder: str) -> str:
    """Copy the files of tokenizer and processor; return the folder that they are from.

    A warning is issued if there are none.
    """
    source = checkpoint.path
    if not os.path.isdir(source):
        patterns = [*PROCESSING, CARD]
        source = snapshot_download(source, revision=checkpoint.revision, allow_patterns=patterns)
    copy_processing(source, folder)
    if not processing_files(folder):
        warn_unknown(checkpoint.model_class)
    return source


# Metadata of a model card that is valid for the dense model only.
_DENSE_ONLY = ("eval_results", "model_name", "metrics", "base_model_relation", "library_name")


def write_card(
    model: PreTrainedModel, source: str, folder: str, template: str | None = None
) -> None:
    """Write the card of the packed model, followed by the text of the dense model's card.

    Metadata of the dense model are kept, except its evaluation results and names.
    """
    card: Any = replace(card_of(model), template=template).render(model, folder)
    dense_card: Any = card_in(source)
    if dense_card is not None:
        for name in (*_DENSE_ONLY, *(["base_model"] if card.data.base_model else [])):
            setattr(dense_card.data, name, None)
        card = merge_cards(card, dense_card)
        if card.data.base_model:
            card.data.base_model_relation = "quantized"
    card.save(os.path.join(folder, CARD))
