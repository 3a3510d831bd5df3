"""Replaces the model in a folder: readers find the old model, the new one, or an error.

    out/.hf-quantnoise-part/   the new model while it is written
    out/interrupted-save/      the complete new model, while its files are placed in out/

Once the new model is complete and on the disk, ``out/config.json`` is removed, so that nothing can
be loaded from the folder. Then the other files are placed, those of the old model are removed, and
``config.json`` is placed last. A process killed before this leaves the old model in the folder. If
it is killed in between, the new model is complete in ``interrupted-save``; the next save to the
folder first places its files, and loading with this package raises an error that names it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress

from transformers.utils import CONFIG_NAME

from .durable import files_of, flush, flush_folder, remove

PART, COMPLETE, _NEW = ".hf-quantnoise-part", "interrupted-save", ".new"
# What is not part of a model, as patterns of huggingface_hub.
UNPUBLISHED = (f"{PART}/*", f"{COMPLETE}/*")

_VARIANT = r"(?:\.(?P<{}>[\w-]+?))?"
_WEIGHTS = re.compile(
    rf"model{_VARIANT.format('one')}(?:-\d{{5}}-of-\d{{5}})?\.safetensors"
    rf"|model\.safetensors\.index{_VARIANT.format('other')}\.json"
)


def stale_weights(names: Iterable[str], new: Collection[str]) -> list[str]:
    """Return the weight files and indices that a save with the files ``new`` leaves behind.

    transformers loads ``model.safetensors`` even if there are newer shards. Files of other variants
    (``model.fp16.safetensors``) are kept.
    """
    variants = {variant_of(name) for name in new} - {None}
    return [name for name in names if name not in new and variant_of(name) in variants]


def variant_of(name: str) -> str | None:
    """Return the variant of a file with weights, "" for the default; None for another file."""
    match = _WEIGHTS.fullmatch(name)
    return match and (match["one"] or match["other"] or "")


@contextmanager
def replaced_model(folder: str | os.PathLike, old: Collection[str] = ()) -> Iterator[str]:
    """Yield a new folder whose files are placed in ``folder`` if the block succeeds.

    Args:
        folder: the folder; created if it does not exist. It is not changed if the block raises.
        old: entries of the old model, relative to the folder, to remove unless the new model has
            them. Its weights are removed in any case, all other entries are kept.
    """
    folder = os.fspath(folder)
    existed = os.path.isdir(folder)
    finish_interrupted(folder)
    part = os.path.join(folder, PART)
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    try:
        yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        if not existed:
            with suppress(OSError):
                os.rmdir(folder)
        raise
    if os.path.lexists(os.path.join(folder, CONFIG_NAME)):  # otherwise there is nothing to lose
        flush_folder(part)
    os.replace(part, os.path.join(folder, COMPLETE))
    _place_files(folder, old)


def finish_interrupted(folder: str) -> None:
    """Place the files of a complete model that a killed process has left in a folder."""
    if os.path.isdir(os.path.join(folder, COMPLETE)):
        _place_files(folder)


def require_not_interrupted(folder: str | os.PathLike) -> None:
    """Raise OSError if a folder has no model because a save to it was interrupted."""
    folder = os.path.normpath(folder)
    complete = os.path.join(folder, COMPLETE)
    if os.path.isdir(complete) and not os.path.isfile(os.path.join(folder, CONFIG_NAME)):
        raise OSError(
            f"invalid folder {folder!r}: a save to it was interrupted, and the complete "
            f"new model is in {complete!r}; load it from there, or move its files to the folder"
        )


def _place_files(folder: str, old: Collection[str] = ()) -> None:
    """Place the files of the complete new model in its folder; may be repeated after a kill."""
    complete, config = os.path.join(folder, COMPLETE), os.path.join(folder, CONFIG_NAME)
    names = set(files_of(complete))
    if has_config := CONFIG_NAME in names:
        with suppress(FileNotFoundError):
            os.unlink(config)
    for name in sorted(names - {CONFIG_NAME}):
        _place(os.path.join(complete, name), os.path.join(folder, name))
    _remove_old(folder, {*old, *stale_weights(os.listdir(folder), names)} - names)
    flush(folder)
    if has_config:
        _place(os.path.join(complete, CONFIG_NAME), config)
        flush(folder)
    part = os.path.join(folder, PART)
    shutil.rmtree(part, ignore_errors=True)
    # Renamed first: what is left if this process is killed while it removes it is not complete.
    os.replace(complete, part)
    shutil.rmtree(part, ignore_errors=True)


def _place(source: str, target: str) -> None:
    """Link (or copy) a file to another path, where it replaces the old one at once."""
    if os.path.exists(target) and os.path.samefile(source, target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with suppress(FileNotFoundError):
        os.unlink(target + _NEW)
    try:
        os.link(source, target + _NEW)
    except OSError:  # the file system has no hard links
        shutil.copyfile(source, target + _NEW)
        flush(target + _NEW)
    os.replace(target + _NEW, target)


def _remove_old(folder: str, entries: Collection[str]) -> None:
    """Remove entries of a folder, and the subfolders that are empty then."""
    for name in entries:
        path = os.path.join(folder, name)
        if os.path.lexists(path):
            remove(path)
    for subfolder in {os.path.dirname(name) for name in entries} - {""}:
        with suppress(OSError):  # it has other files
            os.rmdir(os.path.join(folder, subfolder))
