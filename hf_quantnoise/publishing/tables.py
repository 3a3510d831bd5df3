"""Markdown tables and lists for model cards."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from ..configuration import QuantizedModelConfig
from ..hub.card import format_metrics
from ..size import SENTINEL, SizeReport, SizeRow
from ..text import markdown, markdown_code


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table that shows each cell as it is; None is an empty cell."""

    def row(cells: Sequence[object]) -> str:
        return f"| {' | '.join('' if cell is None else markdown(cell) for cell in cells)} |"

    return "\n".join(map(row, [head, ["---"] * len(head), *rows]))


def megabytes(size: float) -> str:
    """Format bytes as MB (10^6 bytes) with two decimals, or four below 0.1 MB."""
    return f"{size / 1e6:,.{2 if size >= 1e5 else 4}f}"


def results_table(before: dict[str, float], after: dict[str, float], packed: bool) -> str:
    """Return metrics before and after compression; unknown metrics are empty cells."""
    rows = [
        (name, *(f"{side[name]:.4f}" if name in side else None for side in (before, after)))
        for name in {**before, **after}
    ]
    if not packed:
        return table(("", "value"), [(name, value) for name, _, value in rows])
    if not before:
        return table(("", "compressed"), [(name, value) for name, _, value in rows])
    return table(("", "original", "compressed"), rows)


def sizes_table(report: SizeReport, packed: bool) -> str:
    """Return the size of a model on disk and in memory, beside its size in float32 and float16."""
    total = report.total
    sizes: dict[str, float] = {}
    if packed and total.dense_bytes is not None:
        sizes |= {"float32": total.dense_bytes, "float16": total.dense_bytes / 2}
    sizes |= {"this model, on disk": total.disk_bytes, "this model, in memory": total.memory_bytes}
    if not packed or total.dense_bytes is None:
        return table(("", "MB"), [(name, megabytes(size)) for name, size in sizes.items()])
    rows = [
        (name, megabytes(size), f"{total.dense_bytes / size:.1f}") for name, size in sizes.items()
    ]
    return table(("", "MB", "times smaller"), rows)


def plan_table(config: QuantizedModelConfig, report: SizeReport) -> str:
    """Return how each structure group is stored, with its size in float32 and in the file.

    The columns of sizes add up to the size of the dense model and of the file.
    """
    groups: dict[tuple, list[SizeRow]] = {}
    tensors = [row for row in report.rows if row.stored != SENTINEL]
    for row in tensors:
        entry = config.plan.get(row.name.removesuffix(".weight"), {})
        key = (row.group, row.stored, _block_size(entry), entry.get("n_centroids"))
        if row.stored.startswith("tied"):
            key = (row.group, "tied", None, None)
        groups.setdefault(key, []).append(row)
    lines = []
    for key, rows in sorted(groups.items(), key=lambda item: [str(part) for part in item[0]]):
        sizes = (sum(row.dense_bytes or 0 for row in rows), sum(row.disk_bytes for row in rows))
        lines.append((*key, len(rows), *map(megabytes, sizes)))
    header = report.total.disk_bytes - sum(row.disk_bytes for row in tensors)
    lines.append(("file header", None, None, None, None, None, megabytes(header)))
    head = ("group", "stored as", "block size", "centroids", "tensors", "MB (float32)", "MB")
    return table(head, lines)


def _block_size(entry: dict[str, Any]) -> object:
    sizes = entry.get("block_sizes")
    return entry.get("block_size") if sizes is None else ", ".join(map(str, sizes))


def skipped_layers(reasons: dict[str, str]) -> str:
    """List the reasons why layers are not quantized, each with up to three of its layers."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    lines = []
    for reason, names in by_reason.items():
        shown = ", ".join(map(markdown_code, names[:3]))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"- {shown}{more}: {markdown(reason)}")
    return "\n".join(lines)


def history_table(history: Sequence[dict[str, Any]]) -> str:
    """Return a table of the compression stages, the dense model first."""
    return table(*history_rows(history))


def history_rows(history: Sequence[dict[str, Any]]) -> tuple[Sequence[str], list[tuple]]:
    """Return the head and the rows of :func:`history_table`."""
    rows = [
        (
            record["stage"],
            record["layers"],
            f"{record['relative_error']:.4f}",
            megabytes(1e6 * record["mb"]),
            format_metrics(record["metric"]),
        )
        for record in history
    ]
    return ("stage", "layers quantized", "relative error", "MB", "metrics"), rows


def changed_fields(config: Any, without: Iterable[str] = ()) -> dict[str, Any]:
    """Return the fields of a dataclass whose values differ from the defaults."""
    default = type(config)()
    names = [field.name for field in dataclasses.fields(config) if field.name not in without]
    values = {name: getattr(config, name) for name in names}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def bullets(values: dict[str, Any]) -> str:
    """Return settings as a Markdown list."""
    return "\n".join(
        f"- {markdown(name)}: {markdown_code(value)}" for name, value in values.items()
    )
