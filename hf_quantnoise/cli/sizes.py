"""The size of a model that was not loaded, and how it is shown: a table, JSON, or a picture."""

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

# A report and a file agree within this share (CONTRIBUTING.md), or the file is what is told.
TOLERANCE = 0.01
# Types of tensors that are no weights: positions, counts and masks.
PLAIN = ("I64", "BOOL")


def report_of(checkpoint: Checkpoint) -> tuple[SizeReport, str | None]:
    """Counts the bytes of a model. Its weights are read only where it has no safetensors file.

    Returns:
        The report; and what is to be known of it, where it could not be made layer by layer.

    Raises:
        ValueError: if there is nothing to count, or a file is cut short.
    """
    headers = checkpoint.headers
    if headers is None:
        if not checkpoint.has_config:
            raise ValueError(f"{checkpoint.path!r} holds no config.json and no *.safetensors")
        return size_report(checkpoint.load()), "no safetensors file: the weights were read"
    model, why = None, None
    try:
        model = checkpoint.skeleton()
    except Exception as error:  # any model's code, and any config
        expected = isinstance(error, ValueError | FileNotFoundError)
        why = str(error) if expected else f"{type(error).__name__}: {error}"
    if model is not None:
        report = size_report(model)
        counted = report.total.disk_bytes
        if abs(counted - headers.file_bytes) <= TOLERANCE * headers.file_bytes:
            return report, None
        why = f"{type(model).__name__} as its config describes it would take {counted:,} bytes"
    note = f"tensors as they stand in the files, {headers.file_bytes:,} bytes ({why})"
    return _as_in_files(headers, model), note


def _as_in_files(headers: Headers, model) -> SizeReport:
    """One row for each tensor of the files."""
    groups = {} if model is None else {f"{la.name}.weight": la.group for la in find_layers(model)}
    rows = []
    for name, tensor in headers.tensors.items():
        size = bytes_of(tensor)
        kind = str(FLOATS.get(tensor.dtype, tensor.dtype)).removeprefix("torch.").lower()
        shape, group, dense = tuple(tensor.shape), groups.get(name, "other"), _dense_bytes(tensor)
        rows.append(SizeRow(name, group, kind, shape, size, size, size, dense))
    return SizeReport(rows, headers.file_bytes - headers.tensor_bytes)


def _dense_bytes(tensor) -> int | None:
    """What a tensor would take in float32; None for what may be another package's codes."""
    if tensor.dtype in FLOATS:
        return 4 * tensor.parameter_count
    return bytes_of(tensor) if tensor.dtype in PLAIN else None


def layer_table(report: SizeReport) -> str:
    """A line for each layer, one for all tensors of no layer, and the totals."""
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
    """How a report is shown: ``per`` and ``json`` of the arguments."""
    parser.add_argument("--per", choices=list(TABLES), default=per, help="Lines of the table.")
    parser.add_argument("--json", action="store_true", help="Every row, in bytes, as JSON.")


def show(report: SizeReport, args: Namespace, **more: Any) -> None:
    """Prints a report as the flags of :func:`add_table_arguments` ask for it; ``more`` stands in
    JSON alone."""
    if args.json:
        print(json.dumps({"model": args.model, **more, **to_dict(report)}, indent=2))
    else:
        print(TABLES[args.per](report))


def to_dict(report: SizeReport) -> dict[str, Any]:
    """A JSON-able dict, in bytes."""
    total = report.total
    return {
        "rows": [asdict(row) for row in report.rows],
        "header_bytes": report.header_bytes,
        "total": {**asdict(total), "times_smaller": total.times_smaller},
        "left_dense": report.left_dense,
    }


def draw(report: SizeReport, per: str, title: str, file_name: str) -> None:
    """Draws bytes on disk as bars, one for each layer (or group), coloured by how it is stored.

    Raises:
        ImportError: naming the extra, where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("--png needs matplotlib: pip install 'hf-quantnoise[plots]'") from None
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
    """(layer or group, how it is stored) -> bytes, of all that takes room."""
    bars: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.disk_bytes:
            of_layer = per == "layer" and row.group != "other"
            key = (row.name.removesuffix(".weight") if of_layer else row.group, row.stored)
            bars[key] = bars.get(key, 0) + row.disk_bytes
    return bars
