"""Results of benchmarks: one JSON line per finished run, so that a broken one can go on."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from datetime import datetime, timezone

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "examples"))

from compression_run import versions  # noqa: E402


def read_lines(path: str) -> list[dict]:
    """The finished runs of a results file; none where there is no file."""
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def append_line(path: str, key: dict, results: dict, metric: str) -> None:
    """Appends a finished run of an example.

    Args:
        path: the results file; made with its folder where it is missing.
        key: what decides the run's figures.
        results: what the example's ``results.json`` holds.
        metric: the one to keep under its own name.
    """
    compressed = results.get("compressed")
    figures = results["reloaded"] if compressed else results["dense"]
    part = compressed or results["dense"]
    line = {
        "key": key,
        metric: figures["metrics"][metric],
        "bytes": part["bytes"],
        "dense_bytes": results["dense"]["bytes"],
        "seconds": part["seconds"],
        "stages": part.get("stages"),
        "logits_bit_equal": figures.get("logits_bit_equal"),
        "examples": results["examples"],
        "command": shlex.join([os.path.basename(sys.executable), *sys.argv]),
        "machine": machine(),
        "versions": versions(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if compressed and "metrics" in results["dense"]:
        line[f"dense_{metric}"] = results["dense"]["metrics"][metric]
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def machine() -> str:
    """Processor (and GPU) of this machine, with the number of threads in use."""
    name = platform.processor() or platform.machine()
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
        name = names[0] if names else name
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {name}"
    return f"{name}, {torch.get_num_threads()} threads"
