"""Size of a model that is not loaded, shown as a table, JSON or plot."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..hub.reading import FLOATS
from ..size import SizeReport, SizeRow, aligned, kilobytes, size_report, total_of
from ..structure import find_layers
from .checkpoints import Checkpoint
from .headers import Headers, bytes_of

# If report and files differ by more than this fraction, the files are reported instead.
TOLERANCE = 0.01
# Types of tensors that are not weights: positions, counts and masks.
INTEGERS = ("I64", "BOOL")


def report_of(checkpoint: Checkpoint) -> tuple[SizeReport, str | None]:
    """Count the bytes of a model. Weights are loaded only if it has no safetensors files.

    Returns:
        The report, and a note if it could not be made layer by layer (else None).
    """
    headers = checkpoint.headers
    if headers is None:
        if not checkpoint.has_config:
            raise ValueError(f"{checkpoint.path!r} has no config.json and no *.safetensors file")
        return size_report(checkpoint.load()), "no safetensors file: the weights were loaded"
    model, reason = None, None
    try:
        model = checkpoint.skeleton()
    except Exception as error:  # from the code of any model
        expected = isinstance(error, ValueError | FileNotFoundError)
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
    if model is not None:
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
        size = bytes_of(tensor)
        kind = str(FLOATS.get(tensor.dtype, tensor.dtype)).removeprefix("torch.").lower()
        shape, group, dense = tuple(tensor.shape), groups.get(name, "other"), _dense_bytes(tensor)
        rows.append(SizeRow(name, group, kind, shape, size, size, size, dense))
    return SizeReport(rows, headers.file_bytes - headers.tensor_bytes)


def _dense_bytes(tensor) -> int | None:
    """Return the bytes of a tensor in float32, or None for codes of another package."""
    if tensor.dtype in FLOATS:
        return 4 * tensor.parameter_count
    return bytes_of(tensor) if tensor.dtype in INTEGERS else None


def layer_table(report: SizeReport) -> str:
    """Return a table with a line per layer, one for all other tensors, and the totals."""
    lines = [("layer", "stored", "group", "disk kB", "dense kB")]
    layers = [row for row in report.rows if row.group != "other"]
    others = [row for row in report.rows if row.group == "other"]
    lines += [
        (row.name, row.stored, row.group, *kilobytes(row.disk_bytes, row.dense_bytes))
        for row in layers
    ]
    rest = total_of(others)
    sums = kilobytes(rest.disk_bytes, rest.dense_bytes)
    lines.append((f"{len(others)} other tensors", "", "other", *sums))
    lines.append(("file header", "", "", *kilobytes(report.header_bytes), ""))
    total = report.total
    lines.append(("total", "", "", *kilobytes(total.disk_bytes, total.dense_bytes)))
    return aligned(lines, left=3) + "\n" + report.closing_lines()


TABLES = {"group": str, "layer": layer_table}


def add_table_arguments(parser: ArgumentParser, per: str) -> None:
    """Add ``per`` and ``json``: the form of a report."""
    parser.add_argument("--per", choices=list(TABLES), default=per, help="Rows of the table.")
    parser.add_argument("--json", action="store_true", help="Print all rows as JSON, in bytes.")


def show(report: SizeReport, args: Namespace, **more: Any) -> None:
    """Print a report as table or JSON; ``more`` is added to the JSON."""
    if args.json:
        print(json.dumps({"model": args.model, **more, **to_dict(report)}, indent=2))
    else:
        print(TABLES[args.per](report))


def to_dict(report: SizeReport) -> dict[str, Any]:
    """Return a JSON-able dict, in bytes."""
    total = report.total
    return {
        "rows": [asdict(row) for row in report.rows],
        "header_bytes": report.header_bytes,
        "total": {**asdict(total), "times_smaller": total.times_smaller},
        "left_dense": report.left_dense,
    }


def draw(report: SizeReport, per: str, title: str, file_name: str) -> None:
    """Plot bytes on disk as one bar per layer (or group), coloured by how it is stored."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "--png requires matplotlib; run pip install 'hf-quantnoise[plots]'"
        ) from None
    bars = _bars(report.rows, per)
    kinds = list(dict.fromkeys(kind for _, kind in bars))
    figure = Figure(figsize=(8, 1.5 + 0.2 * len({name for name, _ in bars})))
    axes = figure.add_subplot()
    names = list(dict.fromkeys(name for name, _ in bars))
    left = dict.fromkeys(names, 0.0)
    for kind in kinds:
        widths = [bars.get((name, kind), 0) / 1e3 for name in names]
        axes.barh(names, widths, left=list(left.values()), label=kind)
        left = {name: left[name] + width for name, width in zip(names, widths, strict=True)}
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("kB on disk")
    axes.set_title(f"{title}: {report.total.disk_bytes / 1e6:.3f} MB")
    axes.legend()
    figure.savefig(file_name, dpi=120, bbox_inches="tight")


def _bars(rows: Sequence[SizeRow], per: str) -> dict[tuple[str, str], int]:
    """Return (layer or group, how it is stored) -> bytes."""
    bars: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.disk_bytes:
            of_layer = per == "layer" and row.group != "other"
            key = (row.name.removesuffix(".weight") if of_layer else row.group, row.stored)
            bars[key] = bars.get(key, 0) + row.disk_bytes
    return bars
