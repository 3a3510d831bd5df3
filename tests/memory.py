"""Counts the bytes of tensors that live while something runs, files mapped into memory included."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
