"""Files that are complete whenever they exist, and folders whose files are listed and checked.

A file is written under a temporary name and renamed once its content is on the disk. A folder is
complete once it has its list of files (``files.json``: size and SHA-256 of each), which is written
last.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LIST_NAME = "files.json"
PART = ".part"


def flush(path: str) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name != "posix":  # elsewhere folders have no descriptors
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: str) -> None:
    """Wait until all files of a folder are on the disk."""
    for inside, _, names in os.walk(folder):
        for name in names:
            flush(os.path.join(inside, name))
        flush(inside)


@contextmanager
def new_file(path: str) -> Iterator[str]:
    """Yield a temporary path; the file written there is then renamed to ``path``."""
    yield path + PART
    flush(path + PART)
    os.replace(path + PART, path)
    flush(os.path.dirname(os.path.abspath(path)))


def write_text(text: str, path: str) -> None:
    """Write a text file that is complete whenever it exists."""
    with new_file(path) as part, open(part, "w", encoding="utf-8") as file:
        file.write(text)


def write_json(value: Any, path: str, **kwargs: Any) -> None:
    """Write a JSON file that is complete whenever it exists; ``kwargs`` are those of ``dumps``."""
    write_text(json.dumps(value, indent=2, **kwargs) + "\n", path)


def checksum(path: str) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(folder: str) -> Iterator[str]:
    """Yield the paths, relative to a folder, of the files in it and in its subfolders."""
    for inside, _, names in os.walk(folder):
        for name in names:
            yield os.path.relpath(os.path.join(inside, name), folder).replace(os.sep, "/")


def path_within(folder: str, path: str) -> str | None:
    """Return a path relative to a folder, "." for the folder itself; None if it is not in it."""
    inner, outer = Path(path).resolve(), Path(folder).resolve()
    return inner.relative_to(outer).as_posix() if inner.is_relative_to(outer) else None


def entries(folder: str, pattern: str) -> list[str]:
    """Return the names in a folder, which may be missing, that match a regular expression."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [name for name in names if re.fullmatch(pattern, name)]


def remove(path: str) -> None:
    """Remove a file, a link, or a folder with all that is in it."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def remove_entries(folder: str, pattern: str) -> None:
    """Remove the files and subfolders whose name matches, and the folder if it is empty then."""
    for name in entries(folder, pattern):
        with suppress(FileNotFoundError):  # removed by a process of another machine
            remove(os.path.join(folder, name))
    with suppress(OSError):  # missing, or it has other files
        os.rmdir(folder)


def write_list(folder: str) -> None:
    """Flush the files of a folder, then list them: the last step of writing it."""
    flush_folder(folder)
    files = {
        name: {"size": os.path.getsize(path), "sha256": checksum(path)}
        for name in sorted(files_of(folder))
        if name != LIST_NAME and (path := os.path.join(folder, name))
    }
    write_json({"files": files}, os.path.join(folder, LIST_NAME))


def has_list(folder: str) -> bool:
    """Return whether a folder has a list; folders of earlier releases have none."""
    return os.path.lexists(os.path.join(folder, LIST_NAME))


def find_defect(folder: str, checksums: bool = True) -> str | None:
    """Return the first listed file that is missing or has changed; None if there is none.

    Other files are not checked. Without ``checksums`` only sizes are compared.
    """
    try:
        with open(os.path.join(folder, LIST_NAME), encoding="utf-8") as file:
            entries = [
                (str(name), int(entry["size"]), str(entry["sha256"]))
                for name, entry in json.load(file)["files"].items()
            ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return LIST_NAME
    for name, size, digest in entries:
        path = os.path.join(folder, name)
        if not os.path.isfile(path) or os.path.getsize(path) != size:
            return name
        if checksums and checksum(path) != digest:
            return name
    return None
