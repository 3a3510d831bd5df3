"""torch's OpenMP threads, which have no public interface in Python."""

from __future__ import annotations

import ctypes
import os
import re
from functools import cache
from typing import Any

import torch

_PROCESS = os.getpid()
_NAME = re.compile(r"lib(gomp|iomp5|omp)\b")


@cache
def openmp() -> Any:
    """Return the OpenMP library that torch has loaded, with ``GOMP_parallel``; None if unknown.

    It is known on Linux only.
    """
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
            fields = [line.rstrip("\n").split(maxsplit=5) for line in file]
    except OSError:
        return None
    paths = {each[5] for each in fields if len(each) == 6}  # may have spaces
    loaded = [path for path in paths if _NAME.match(os.path.basename(path))]
    folder = os.path.dirname(torch.__file__)
    of_torch = [path for path in loaded if path.startswith(folder)] or loaded
    if len(of_torch) != 1:
        return None
    try:
        library = ctypes.CDLL(of_torch[0])
    except OSError:  # the file was deleted, e.g. by an update
        return None
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    return library if all(hasattr(library, name) for name in names) else None


def usable_threads() -> int:
    """Return how many threads :func:`openmp` may use: as many as torch, and one after a fork.

    The threads of a process do not exist in its forks, and OpenMP would wait for them.
    """
    return torch.get_num_threads() if openmp() is not None and os.getpid() == _PROCESS else 1
