"""Kills a process at each step of writing files, and looks at what a reader finds afterwards.

The process is forked, so that it has all modules and models, and ends with ``os._exit``: without
cleaning up, like a killed one.
"""

from __future__ import annotations

import builtins
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers import modeling_utils

# Events of Python's audit hooks that change files.
EVENTS = {"open", "os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir"}


def _kill_before(step: int, folder: Path) -> None:
    """End the process before its n-th change of a file in a folder."""
    count = 0
    real_save = modeling_utils.safe_save_file

    def is_next() -> None:
        nonlocal count
        count += 1
        if count == step:
            os._exit(9)

    def hook(event: str, arguments: tuple) -> None:
        if event not in EVENTS or str(folder) not in os.path.abspath(str(arguments[0])):
            return
        if event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            is_next()

    def save(*args, **kwargs) -> None:  # in Rust, without an event
        is_next()
        real_save(*args, **kwargs)

    modeling_utils.safe_save_file = save
    sys.addaudithook(hook)


def _kill_within(step: int, folder: Path) -> None:
    """End the process within the n-th file that it writes in a folder, of which half exists."""
    count = 0
    real_open, real_save = builtins.open, modeling_utils.safe_save_file

    def is_last(path: object) -> bool:
        nonlocal count
        count += str(path).startswith(str(folder))
        return count == step

    def half_open(path, mode="r", *args, **kwargs):
        file = real_open(path, mode, *args, **kwargs)
        if "w" in mode and is_last(path):
            file.write("{" if "b" not in mode else b"{")
            file.flush()
            os._exit(9)
        return file

    def half_save(tensors, path, *args, **kwargs):
        real_save(tensors, path, *args, **kwargs)
        if is_last(path):
            os.truncate(path, os.path.getsize(path) // 2)
            os._exit(9)

    builtins.open, modeling_utils.safe_save_file = half_open, half_save


def _survives(action: Callable[[], object]) -> bool:
    """Run an action in a forked process; return whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), f"the action failed, exit code {code}"
    return code == 0


def each_kill(old: Path, folder: Path, action: Callable[[], object]) -> Iterator[str]:
    """Yield after each kill: ``folder``, a copy of ``old``, is as the killed action left it.

    The last one yielded is ``"complete"``: the action that was not killed.
    """
    for kill in (_kill_before, _kill_within):
        step, alive = 0, False
        while not alive:
            step += 1
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(old, folder)

            def killed(kill=kill, step=step) -> None:
                kill(step, folder)
                action()

            alive = _survives(killed)
            if not alive:
                yield f"{kill.__name__} {step}"
    yield "complete"
