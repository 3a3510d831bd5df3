"""Size of a model that is not loaded, shown as a table, JSON or plot."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict
from typing import Any

from ..files.reading import FLOATS
from ..size import SizeReport, SizeRow, aligned, kilobytes, size_report, total_of
from ..structure import find_layers
from .checkpoints import Checkpoint
from .headers import Headers

# If report and files differ by more than this fraction, the files are reported instead.
TOLERANCE = 0.01
# Types of tensors that are not weights: positions, counts and masks.
INTEGERS = ("I64", "BOOL")


def report_of(checkpoint: Checkpoint) -> tuple[SizeReport, str | None]:
    """Return the size of a model, and a note if it could not be counted layer by layer (else None).

    Weights are loaded only if it has no safetensors files. Raises ValueError if the model is packed
    and its plan is invalid.
    """
    headers = checkpoint.headers
    if headers is None:
        if not checkpoint.has_config:
            raise ValueError(
                f"{checkpoint.path!r} has no config.json and no *.safetensors file; pass the "
                "folder of a saved model"
            )
        return size_report(checkpoint.load()), "no safetensors file: the weights were loaded"
    try:
        model = checkpoint.skeleton()
    except Exception as error:  # from the code of any model
        model = None
        expected = isinstance(error, ValueError | FileNotFoundError)
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
    else:
        checkpoint.pack(model)  # its errors are those of the files
        report = size_report(model)
        counted = report.total.disk_bytes
        if abs(counted - headers.file_bytes) <= TOLERANCE * headers.file_bytes:
            return report, None
        reason = f"{type(model).__name__} with this config would take {counted:,} bytes"
    note = f"tensors as stored in the files, {headers.file_bytes:,} bytes ({reason})"
    return _as_in_files(headers, model), note


def _as_in_files(headers: Headers, model) -> SizeReport:
    """Return a report with one row per tensor of the files."""
    groups = {} if model is None else {f"{la.name}.weight": la.group for la in find_layers(model)}
    rows = []
    for name, tensor in headers.tensors.items():
        size = tensor.nbytes
        kind = str(FLOATS.get(tensor.dtype, tensor.dtype)).removeprefix("torch.").lower()
        dense = size if tensor.dtype in INTEGERS else None  # None: codes of another package
        if tensor.dtype in FLOATS:
            dense = 4 * tensor.parameter_count
        group = groups.get(name, "other")
        rows.append(SizeRow(name, group, kind, tuple(tensor.shape), size, size, size, dense))
    return SizeReport(rows, headers.file_bytes - sum(row.disk_bytes for row in rows))


def layer_table(report: SizeReport) -> str:
    """Return a table with a line per layer, one for all other tensors, and the totals."""
    others = [row for row in report.rows if row.group == "other"]
    rest, total = total_of(others), report.total
    sums = kilobytes(rest.disk_bytes, rest.dense_bytes)
    lines = [
        ("layer", "stored", "group", "disk kB", "dense kB"),
        *(
            (row.name, row.stored, row.group, *kilobytes(row.disk_bytes, row.dense_bytes))
            for row in report.rows
            if row.group != "other"
        ),
        (f"{len(others)} other tensors", "", "other", *sums),
        ("file header", "", "", *kilobytes(report.header_bytes), ""),
        ("total", "", "", *kilobytes(total.disk_bytes, total.dense_bytes)),
    ]
    return aligned(lines, left=3) + "\n" + report.closing_lines()


def show(report: SizeReport, args: Namespace, **more: Any) -> None:
    """Print a report as table or JSON; ``more`` is added to the JSON."""
    if args.json:
        sums = {**asdict(report.total), "times_smaller": report.total.times_smaller}
        values = {"model": args.model, **more, **asdict(report), "total": sums}
        print(json.dumps(values, indent=2))
    else:
        print(layer_table(report) if args.per == "layer" else report)


def draw(report: SizeReport, per: str, title: str, file_name: str) -> None:
    """Plot the size of each layer (or group) as PNG."""
    from ..compression.reporting.plots import plot_sizes, save

    try:
        save(plot_sizes(report, per, title), file_name)
    except ImportError:
        raise ImportError(
            "--png requires matplotlib; run pip install 'hf-quantnoise[plots]'"
        ) from None
