"""Tokenizers and processors, which are saved with a packed model.

Without its tokenizer a model is of little use, and transformers (5.23) loads an empty one from a
folder that has none. Nothing is downloaded for this.
"""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, logging

logger = logging.get_logger(__name__)

# Attribute of a model that holds its tokenizer or processor.
PROCESSING_ATTRIBUTE = "quantnoise_processing"
# Attribute of a model that holds the folder of its weights, which neither name_or_path nor the
# config has if it was loaded with a subfolder, revision or cache_dir.
_FOLDER_ATTRIBUTE = "quantnoise_folder"
# Files of tokenizers and processors.
PROCESSING = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "*.model", "*.tiktoken", "chat_template*", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
# Main inputs of models that have a tokenizer or processor.
_TEXT = "input_ids"
_INPUTS = (_TEXT, "pixel_values", "input_values", "input_features", "pixel_values_videos")


def processing_files(folder: str) -> list[str]:
    """Return the names of the files of tokenizers and processors in a folder."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [
        name
        for name in names
        if any(fnmatch(name, pattern) for pattern in PROCESSING)
        and os.path.isfile(os.path.join(folder, name))
    ]


def copy_processing(source: str, folder: str) -> None:
    """Copy the files of tokenizers and processors from one folder to another."""
    for name in processing_files(source):
        shutil.copyfile(os.path.join(source, name), os.path.join(folder, name))


def remember_processing(model: Any, processing_class: Any) -> None:
    """Let a model save a tokenizer or processor when it is packed; None keeps the last one."""
    if hasattr(processing_class, "save_pretrained"):
        setattr(model, PROCESSING_ATTRIBUTE, processing_class)


def remember_folder(model: PreTrainedModel, checkpoint_files: Iterable[str] | None) -> None:
    """Remember the folder that a model is loaded from."""
    for file in checkpoint_files or ():
        setattr(model, _FOLDER_ATTRIBUTE, os.path.dirname(file))
        return


def has_processing(model: PreTrainedModel, folder: str | None = None) -> bool:
    """Return whether a tokenizer or processor of a model is known, or is in its folder."""
    known = getattr(model, PROCESSING_ATTRIBUTE, None) is not None
    folders = filter(None, (folder, _source(model)))
    return known or any(map(processing_files, folders))


def save_processing(model: PreTrainedModel, folder: str, existing: str | None = None) -> None:
    """Write the tokenizer or processor of a model to a folder; warn if no tokenizer is known.

    It is the one that the model was compressed with, or that of the folder (or cached repository)
    that the model was loaded from. The latter does not replace one in the folder.

    Args:
        model: any model.
        folder: the folder.
        existing: folder that ``folder`` will be merged into.
    """
    existing = existing or folder
    if (known := getattr(model, PROCESSING_ATTRIBUTE, None)) is not None:
        known.save_pretrained(folder)
        return
    source = _source(model)
    found = processing_files(source) if source else []
    if kept := processing_files(existing):
        if any(
            not filecmp.cmp(os.path.join(source, name), os.path.join(existing, name), False)
            for name in {*found} & {*kept}
        ):
            logger.warning(
                f"the tokenizer or processor in {existing!r} is kept, but differs from the one in "
                f"{source!r}, which the model was loaded from; if it belongs to another model, "
                f"call save_pretrained({existing!r}) of the right one"
            )
    elif found:
        copy_processing(source, folder)
    elif type(model).main_input_name == _TEXT:  # without a processor, loading one raises
        warn_unknown(type(model))


def warn_unknown(model_class: type[PreTrainedModel]) -> None:
    """Warn that no tokenizer or processor is saved, unless the models of a class need none."""
    if model_class.main_input_name not in _INPUTS:
        return
    kind, name, effect = "image processor or feature extractor", "processor", ""
    if model_class.main_input_name == _TEXT:
        kind = name = "tokenizer"
        effect = ", and transformers may load an empty one from its folder without an error"
    logger.warning_once(
        f"no {kind} is known for this {model_class.__name__}, so none is saved with it{effect}; "
        f"call {name}.save_pretrained(folder) as well, or pass processing_class={name} to the "
        "trainer or to push_to_hub"
    )


def _source(model: PreTrainedModel) -> str:
    """Return the local folder that a model was loaded from, "" if there is none.

    A subfolder without tokenizer or processor has those of the folder or repository.
    """
    if processing_files(folder := getattr(model, _FOLDER_ATTRIBUTE, "")):
        return folder
    path = getattr(model, "name_or_path", None) or ""
    if not path or os.path.isdir(path):
        return path
    try:
        cached = try_to_load_from_cache(path, CONFIG_NAME)  # of main: no config has its revision
    except HFValidationError:
        return ""
    return os.path.dirname(cached) if isinstance(cached, str) else ""
