"""What something takes of memory: the bytes of tensors that live while it runs, files mapped into
memory included, and what the process itself grows by, holes in its heap too."""

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
    """What :func:`live_bytes` saw.

    Attributes:
        result: what the function returned.
        peak: most bytes that lived at one time, of those that came to life meanwhile.
        left: those that still live.
    """

    result: Any
    peak: int
    left: int


def live_bytes(run: Callable[[], Any]) -> LiveBytes:
    """Runs a function on this thread alone (others are not seen) and counts."""
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
begun = highest()
{counted}
print(highest() - begun)
"""


def growth_of_process(before: str, counted: str) -> int:
    """By how many bytes the most that a new process ever held grows with a piece of a program.

    Args:
        before: what is done first and does not count.
        counted: what does.
    """
    if not Path("/proc/self/status").is_file():
        pytest.skip("no /proc/self/status to read the peak of a process from")
    program = _GROWTH.format(before=before, counted=counted)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)
