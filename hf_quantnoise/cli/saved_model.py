"""Which files of a folder belong to a saved model; ``--overwrite`` removes no others."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from fnmatch import fnmatch
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from ..compression.reporting.plots import PLOTS
from ..files.model_folders import PART, variant_of
from ..files.reading import read_json
from ..hub.processing import processing_files
from ..repository import CARD

_OTHERS = (CONFIG_NAME, GENERATION_CONFIG_NAME, CARD, TRAINING_ARGS_NAME)
_PICKLED = re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin|pytorch_model\.bin\.index\.json")
_GRAPHS = "onnx"
# Subfolder -> the files in it. A subfolder that has others is not part of a model.
_SUBFOLDERS = {
    _GRAPHS: ("*.onnx", "*.onnx_data*"),
    PLOTS: ("*.png",),
    "additional_chat_templates": ("*.jinja",),
}
_SHOWN = 10


def saved_entries(folder: str) -> list[str]:
    """Return the entries of a saved model's folder: files, with paths relative to the folder.

    Empty folders of killed processes of this package are among them.

    Raises:
        ValueError: if the folder has no model, or other files as well.
    """
    names = sorted(os.listdir(folder))
    weights = [name for name in names if variant_of(name) is not None or _PICKLED.fullmatch(name)]
    saved, foreign = {*weights, *_OTHERS, *processing_files(folder)}, []
    config = _config_of(folder) if CONFIG_NAME in names else {}
    saved |= _code_files(folder, config or {})
    entries = []
    for name in names:
        path = os.path.join(folder, name)
        if name.startswith(PART) or (name in saved and os.path.isfile(path)):
            entries.append(name)
        elif name in _SUBFOLDERS and os.path.isdir(path) and not os.path.islink(path):
            inside = [f"{name}/{file}" for file in sorted(os.listdir(path))]
            known = [file for file in inside if _is_saved(folder, file)]
            entries += known
            foreign += [file for file in inside if file not in known]
        else:
            foreign.append(name)
    if foreign:
        more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
        raise ValueError(
            f"output folder {folder!r} has other files than a saved model "
            f"({', '.join(foreign[:_SHOWN])}{more}), which --overwrite does not delete; move them "
            "away or choose another"
        )
    has_weights = weights or any(entry.startswith(f"{_GRAPHS}/") for entry in entries)
    if config is None or not has_weights:
        reason = "config.json of no model" if config is None else "without weights"
        raise ValueError(
            f"output folder {folder!r} is not a saved model ({reason}), and --overwrite does not "
            "replace anything else; remove it or choose another"
        )
    return entries


def _is_saved(folder: str, file: str) -> bool:
    """Return whether a file in a subfolder, ``subfolder/name``, is one that a save writes."""
    subfolder, _, name = file.partition("/")
    is_known = any(fnmatch(name, pattern) for pattern in _SUBFOLDERS[subfolder])
    return is_known and os.path.isfile(os.path.join(folder, file))


def _config_of(folder: str) -> dict[str, Any] | None:
    """Return the content of ``config.json``, or None if it is not that of a model."""
    try:
        config = read_json(os.path.join(folder, CONFIG_NAME))
    except ValueError:
        return None
    return config if "model_type" in config else None


def _code_files(folder: str, config: dict[str, Any]) -> set[str]:
    """Return the names of the files with a model's own code, and of those that they import."""
    auto_map = config.get("auto_map")
    classes = auto_map.values() if isinstance(auto_map, dict) else ()
    names = [each.partition("--") for each in classes if isinstance(each, str)]
    files = {f"{(name or before).partition('.')[0]}.py" for before, _, name in names}
    found: set[str] = set(files)
    for file in files:
        with suppress(OSError):  # it, or one that it imports, is missing
            imported = get_relative_import_files(os.path.join(folder, file))
            found |= {os.path.basename(each) for each in imported}
    return found
