"""The table that closes a run: what each model weighs on disk, and how well it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One model of the table.

    Attributes:
        model: what to call it.
        megabytes: its weights on disk, in 10^6 bytes; see :func:`weights_mb`.
        score: its metric, or None where nothing was evaluated.
    """

    model: str
    megabytes: float
    score: float | None = None


def weights_mb(folder: str | Path) -> float:
    """Size of the ``*.safetensors`` files of a model, in 10^6 bytes: in its folder, and in those of
    its modules where it has some (sentence-transformers).

    Raises:
        FileNotFoundError: if the folder holds none.
    """
    files = list(Path(folder).rglob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors file; save_pretrained writes one")
    return sum(file.stat().st_size for file in files) / 1e6


def closing_table(rows: Sequence[Row], metric: str = "accuracy") -> str:
    """Models beside each other; "times smaller" is counted from the first row.

    Args:
        rows: the uncompressed model, then what became of it.
        metric: name of the scores, which heads their column.
    """
    lines = [("model", "MB on disk", "times smaller", metric)]
    for row in rows:
        smaller = rows[0].megabytes / row.megabytes
        score = "" if row.score is None else f"{row.score:.4f}"
        lines.append((row.model, f"{row.megabytes:.3f}", f"{smaller:.1f}", score))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    return "\n".join([aligned[0], "-" * len(aligned[0]), *aligned[1:]])
