"""Memory use: bytes of live tensors, including memory-mapped files, and growth of a process,
including fragmentation of its heap."""

import gc
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class LiveBytes:
    """Result of :func:`live_bytes`.

    Attributes:
        result: returned by the function.
        peak: maximum of the bytes allocated by the function and not freed yet.
        left: bytes that are still allocated.
    """

    result: Any
    peak: int
    left: int


def live_bytes(run: Callable[[], Any]) -> LiveBytes:
    """Run a function and count the bytes that it allocates on this thread."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
        gc.collect()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return LiveBytes(result, peak, live)


_GROWTH = """
def highest():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024

{before}
start = highest()
{counted}
print(highest() - start)
"""


def growth_of_process(before: str, counted: str) -> int:
    """Return by how many bytes a piece of a program raises the peak memory of a new process.

    Args:
        before: code that runs first and is not counted.
        counted: code that is counted.
    """
    if not Path("/proc/self/status").is_file():
        pytest.skip("no /proc/self/status to read the peak of a process from")
    program = _GROWTH.format(before=before, counted=counted)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)
