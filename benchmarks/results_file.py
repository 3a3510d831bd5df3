"""Results of benchmarks: one JSON line per finished run, so that they can be resumed."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from datetime import UTC, datetime

import torch
from merged_commands import merged

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "examples"))

from hf_quantnoise.runs.compression_run import versions


def stored_as_measured(flags: list[str]) -> list[str]:
    """Return flags, preceded by the storage that was the default when the rows were measured."""
    centroids = [] if "fixed_point" in flags else ["--codebook_bits", "32"]
    return ["--leftover_bits", "32", *centroids, *flags]


def read_lines(path: str) -> list[dict]:
    """Return the finished runs of a results file; an empty list if it does not exist."""
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def line_of(path: str, key: dict) -> dict | None:
    """Return the finished run with a key; None if the results file does not have it."""
    return next((line for line in read_lines(path) if line["key"] == key), None)


def append_line(path: str, key: dict, figures: dict) -> None:
    """Append a finished run, with its command, machine and versions.

    Args:
        path: the results file; created if it is missing, with its folder.
        key: settings that identify the run.
        figures: measured values.
    """
    line = {
        "key": key,
        **figures,
        "command": shlex.join([os.path.basename(sys.executable), *sys.argv]),
        "machine": machine(),
        "versions": versions(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def append_or_compare(path: str, key: dict, figures: dict) -> None:
    """Append a finished run; if it has a row, print whether a repetition gave the same metrics."""
    known = line_of(path, key)
    if known is None:
        append_line(path, key, figures)
        return
    for name in known.keys() & figures.keys() & {"held_out", "dev"}:
        same = known[name] == figures[name]
        note = "equal to its row" if same else f"its row has {known[name]}"
        print(f"{name}: {figures[name]}, {note}", flush=True)


def figures_of(results: dict, metric: str) -> dict:
    """Return the measured values of an example's run.

    Args:
        results: content of its ``results.json``.
        metric: name of the metric to keep.
    """
    compressed = results.get("compressed")
    scored = results["reloaded"] if compressed else results["dense"]
    part = compressed or results["dense"]
    figures = {
        metric: scored["metrics"][metric],
        "bytes": part["bytes"],
        "dense_bytes": results["dense"]["bytes"],
        "seconds": part["seconds"],
        "stages": part.get("stages"),
        "logits_bit_equal": scored.get("logits_bit_equal"),
        "examples": results["examples"],
    }
    if compressed and "metrics" in results["dense"]:
        figures[f"dense_{metric}"] = results["dense"]["metrics"][metric]
    return figures


def provenance(lines: list[dict]) -> list[str]:
    """Return the paragraphs below a table: the commands that make all lines, and each machine."""
    commands = merged(line["command"] for line in lines)
    machines = dict.fromkeys(re.sub(r"\b1 threads$", "1 thread", x["machine"]) for x in lines)
    return [*(f"Command: `{c}`" for c in commands), *(f"Machine: {m}" for m in machines)]


def machine() -> str:
    """Return the processor (and GPU) of this machine, with the number of threads."""
    name = platform.processor() or platform.machine()
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
        name = names[0] if names else name
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {name}"
    return f"{name}, {torch.get_num_threads()} threads"
