"""Loads one model in this process and prints, as JSON, what that and a forward took.

`benchmarks/loading.py` runs it, a fresh process for each load. What is imported late is imported by
loading a tiny model first. Peaks are those of the resident set, pages of mapped files included: a
dense checkpoint is mapped, and read from the file where the first forward touches it.
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

import hf_quantnoise  # noqa: F401  (teaches transformers the format)

TOKENS = torch.ones(1, 8, dtype=torch.long)  # the input of a first output


def _status(name: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is no such file."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
    except OSError:
        return None
    return 1024 * int(fields[name].split()[0]) if name in fields else None


def resident() -> int:
    """Bytes of this process in memory; where the system does not say, the most there ever were."""
    now = _status("VmRSS")
    return peak() if now is None else now


def peak() -> int:
    """The most bytes of this process in memory since :func:`forget_peak`."""
    highest = _status("VmHWM")
    if highest is None:
        unit = 1 if sys.platform == "darwin" else 1024
        highest = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest


def forget_peak() -> None:
    """Begins a new peak, where the system can."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        pass


def out_of_memory(folder: str) -> None:
    """Drops what the system keeps of a folder's files in memory, so that they are read from disk.

    Raises:
        OSError: where the system cannot.
    """
    if not hasattr(os, "posix_fadvise"):
        raise OSError("--cold needs posix_fadvise, which this system lacks; leave it out")
    for entry in os.scandir(folder):
        file = os.open(entry.path, os.O_RDONLY)
        try:
            os.fsync(file)  # what is not on the disk yet cannot be dropped
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def seconds_of(run) -> tuple[float, object]:
    """(seconds, result) of a call."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


@torch.inference_mode()
def measure_cold(folder: str, warm_up: str) -> dict:
    """Seconds of a load and a forward, ``cold_output``, with nothing of the files in memory."""
    load = AutoModelForSequenceClassification.from_pretrained
    load(warm_up)(TOKENS)
    out_of_memory(folder)
    return {"cold_output": seconds_of(lambda: load(folder)(TOKENS))[0]}


@torch.inference_mode()
def measure(folder: str, warm_up: str, shapes: list[tuple[int, int]], repetitions: int) -> dict:
    """Loads ``warm_up``, then ``folder``, and runs it on random tokens.

    Args:
        folder, warm_up: saved models, a small one to warm up with.
        shapes: (batch, length) of each input.
        repetitions: forwards per input; the median counts.

    Returns:
        Seconds (``load``, ``first_output``: load and one forward, ``forward 8x128`` ...) and bytes
        above what was resident before (``load_peak``, ``first_output_peak``, ``held``: resident
        after all forwards, ``forward_peak 8x128`` above what is held then).
    """
    load = AutoModelForSequenceClassification.from_pretrained
    load(warm_up)(TOKENS)
    forget_peak()
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
        forget_peak()
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
    parser.add_argument("--cold", action="store_true", help="only that, with files on disk alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.cold:
        print(json.dumps(measure_cold(args.folder, args.warm_up)))
        return
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    print(json.dumps(measure(args.folder, args.warm_up, shapes, args.repetitions)))


if __name__ == "__main__":
    main()
