"""The closing table of a run: size on disk and metric of each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """A model in the table."""

    model: str
    megabytes: float  # of weights on disk, see :func:`weights_mb`
    score: float | None = None  # None: not evaluated
    more: tuple[float | None, ...] = ()  # scores of further columns


def weights_mb(folder: str | Path) -> float:
    """Return the size of all ``*.safetensors`` files below a folder, in 10^6 bytes."""
    files = list(Path(folder).rglob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no *.safetensors file; run save_pretrained first")
    return sum(file.stat().st_size for file in files) / 1e6


def closing_table(rows: Sequence[Row], *metrics: str) -> str:
    """Return the table of an uncompressed model (the first row) and of compressed ones."""
    lines = [("model", "MB on disk", "times smaller", *(metrics or ("accuracy",)))]
    for row in rows:
        smaller = rows[0].megabytes / row.megabytes
        scores = ("" if score is None else f"{score:.4f}" for score in (row.score, *row.more))
        lines.append((row.model, f"{row.megabytes:.3f}", f"{smaller:.1f}", *scores))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    return "\n".join([aligned[0], "-" * len(aligned[0]), *aligned[1:]])
