"""Load a model in this process and print the time and memory of loading and of forwards as JSON.

`benchmarks/loading.py` starts a new process for each load. A tiny model is loaded first, so that
all modules are imported. Peaks are of the resident set and include pages of mapped files: a dense
checkpoint is mapped and read from disk during the first forward.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time

import torch
from transformers import AutoModelForSequenceClassification

import hf_quantnoise  # noqa: F401  (registers the format)

TOKENS = torch.ones(1, 8, dtype=torch.long)  # the input of the first forward


def _status(name: str) -> int | None:
    """Return a field of /proc/self/status in bytes; None if the file does not exist."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
    except OSError:
        return None
    return 1024 * int(fields[name].split()[0]) if name in fields else None


def resident() -> int:
    """Return the resident memory of this process in bytes, or its peak if that is unknown."""
    now = _status("VmRSS")
    return peak() if now is None else now


def peak() -> int:
    """Return the peak of the resident memory in bytes since :func:`reset_peak`."""
    highest = _status("VmHWM")
    if highest is None:
        unit = 1 if sys.platform == "darwin" else 1024
        highest = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest


def reset_peak() -> None:
    """Reset the peak, if the system supports it."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        pass


def drop_page_cache(folder: str) -> None:
    """Drop the files of a folder from the page cache, so that they are read from disk.

    Raises:
        OSError: if the system does not support it.
    """
    if not hasattr(os, "posix_fadvise"):
        raise OSError("--cold needs posix_fadvise, which this system does not have; remove it")
    for entry in os.scandir(folder):
        file = os.open(entry.path, os.O_RDONLY)
        try:
            os.fsync(file)  # pages that are not on disk yet cannot be dropped
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def seconds_of(run) -> tuple[float, object]:
    """Return the seconds that a call takes, and its result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


@torch.inference_mode()
def measure_cold(folder: str, warm_up: str) -> dict:
    """Return the seconds of a load and a forward without page cache, as ``cold_output``."""
    load = AutoModelForSequenceClassification.from_pretrained
    load(warm_up)(TOKENS)
    drop_page_cache(folder)
    return {"cold_output": seconds_of(lambda: load(folder)(TOKENS))[0]}


@torch.inference_mode()
def measure(folder: str, warm_up: str, shapes: list[tuple[int, int]], repetitions: int) -> dict:
    """Load ``warm_up``, then ``folder``, and run it on random tokens.

    Args:
        folder: saved model to measure.
        warm_up: small saved model.
        shapes: (batch, length) of each input.
        repetitions: forwards per input, of which the median is returned.

    Returns:
        Seconds (``load``, ``first_output`` of load and one forward, ``forward 8x128`` ...) and
        bytes in addition to those before (``load_peak``, ``first_output_peak``, ``held`` after all
        forwards, ``forward_peak 8x128`` in addition to ``held``).
    """
    load = AutoModelForSequenceClassification.from_pretrained
    load(warm_up)(TOKENS)
    reset_peak()
    before = resident()
    figures: dict[str, float] = {}
    figures["load"], model = seconds_of(lambda: load(folder))
    figures["load_peak"] = peak() - before
    first, _ = seconds_of(lambda: model(TOKENS))
    figures["first_output"] = figures["load"] + first
    figures["first_output_peak"] = peak() - before
    for batch, length in shapes:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, model.config.vocab_size, (batch, length), generator=generator)
        model(ids)
        reset_peak()
        held = resident()
        taken = [seconds_of(lambda ids=ids: model(ids))[0] for _ in range(repetitions)]
        figures[f"forward {batch}x{length}"] = statistics.median(taken)
        figures[f"forward_peak {batch}x{length}"] = peak() - held
    figures["held"] = resident() - before
    return figures


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("warm_up")
    parser.add_argument("--shapes", nargs="+", required=True)
    parser.add_argument("--repetitions", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--cold", action="store_true", help="measure without page cache only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.cold:
        print(json.dumps(measure_cold(args.folder, args.warm_up)))
        return
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    print(json.dumps(measure(args.folder, args.warm_up, shapes, args.repetitions)))


if __name__ == "__main__":
    main()
