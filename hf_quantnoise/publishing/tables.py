"""The tables of a card, in Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from ..configuration import QuantizedModelConfig
from ..hub.card import format_metrics
from ..size import SizeReport, SizeRow


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; None is an empty cell, a bar inside a cell (of a regex) is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| "
        + " | ".join("" if cell is None else str(cell).replace("|", "\\|") for cell in line)
        + " |"
        for line in lines
    )


def megabytes(size: float) -> str:
    """Bytes in MB (10^6 bytes): two digits behind the point, four below 0.1 MB."""
    return f"{size / 1e6:,.{2 if size >= 1e5 else 4}f}"


def results_table(
    before: dict[str, float], after: dict[str, float], report: SizeReport, packed: bool
) -> str:
    """Metrics and size, before and after; what was not measured is an empty cell."""
    total = report.total
    rows = [
        (name, *(f"{side[name]:.4f}" if name in side else None for side in (before, after)))
        for name in {**before, **after}
    ]
    if not packed:
        rows = [(name, value) for name, _, value in rows]
        return table(("", "value"), [*rows, ("MB", megabytes(total.disk_bytes))])
    sizes = [
        ("MB", f"{megabytes(total.dense_bytes)} (float32)", megabytes(total.disk_bytes)),
        ("times smaller", 1, f"{total.times_smaller:.1f}"),
    ]
    return table(("", "before", "after"), [*rows, *sizes])


def plan_table(config: QuantizedModelConfig, report: SizeReport) -> str:
    """How each structure group is stored, and what that takes; the columns of bytes add up to the
    size before and to the file."""
    groups: dict[tuple, list[SizeRow]] = {}
    for row in report.rows:
        entry = config.plan.get(row.name.removesuffix(".weight"), {})
        stored = "tied" if row.stored.startswith("tied") else row.stored
        sizes = (entry.get("block_size"), entry.get("n_centroids")) if stored != "tied" else ()
        groups.setdefault((row.group, stored, *(sizes or (None, None))), []).append(row)
    rows = [
        (*key, len(rows), *(megabytes(sum(getattr(row, name) for row in rows)) for name in _BYTES))
        for key, rows in sorted(groups.items(), key=lambda item: [str(part) for part in item[0]])
        if key[1] != "sentinel"
    ]
    rest = report.total.disk_bytes - sum(
        row.disk_bytes for row in report.rows if row.stored != "sentinel"
    )
    head = ("group", "stored as", "block size", "centroids", "tensors", "MB float32", "MB")
    return table(head, [*rows, ("file header", None, None, None, None, None, megabytes(rest))])


_BYTES = ("dense_bytes", "disk_bytes")


def reasons(left_dense: dict[str, str]) -> str:
    """Why weights are in floating point: a line for each reason, with three of its weights."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_dense.items():
        by_reason.setdefault(reason, []).append(name)
    lines = []
    for reason, names in by_reason.items():
        shown = ", ".join(f"`{name}`" for name in names[:3])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"- {shown}{more}: {reason}")
    return "\n".join(lines)


def history_table(history: Sequence[dict[str, Any]]) -> str:
    """The stages of a pass, the dense model first."""
    head = ("stage", "weights packed", "relative error", "MB", "metrics")
    return table(
        head,
        [
            (
                record["stage"],
                record["layers"],
                f"{record['relative_error']:.4f}",
                megabytes(1e6 * record["mb"]),
                format_metrics(record["metric"]),
            )
            for record in history
        ],
    )


def changed_fields(config: Any, without: Iterable[str] = ()) -> dict[str, Any]:
    """Fields of a dataclass whose values are not the defaults."""
    plain = type(config)()
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in without and getattr(config, field.name) != getattr(plain, field.name)
    }


def bullets(values: dict[str, Any]) -> str:
    """Settings, one to a line."""
    return "\n".join(f"- {name}: `{value}`" for name, value in values.items())
