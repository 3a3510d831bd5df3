"""Ablations on text (sections 7.2 to 7.4 and 7.11): rows of ``language_model.py``.

The name of a row has three parts: what is varied, the series, and the value on the horizontal axis
of its plot. Where noise precedes compression, both take ``steps``.
"""

from __future__ import annotations

import itertools
from typing import Any

from language_model_rows import JOINT, LEARNED, LEFTOVERS, TRAINED_RATES, Row

STEPS = 100
SIZE = "any"  # rows without a size are float32 models
STORED = {"block_size": 4, "n_centroids": 64, **LEFTOVERS}
RATES = (0.1, 0.3, 0.5, 1.0)
GROUPS = ("ffn", "embeddings", "attention")


def _row(*name: Any, stored: dict | None = None, **fields: Any) -> Row:
    return Row(
        " / ".join(map(str, name)),
        SIZE,
        {**STORED, **JOINT, **(stored or {})},
        splits=("held_out", "dev"),
        **fields,
    )


def rates(steps: int) -> list[Row]:
    """Vary the noise rate before iPQ (figure 3), and how exact noise is approximated (table 5)."""

    def before(*name: Any, **noise: Any) -> Row:
        return _row(*name, noise=noise, noise_steps=steps, compression_steps=steps)

    noises = {"proxy": "proxy", "exact PQ": "pq"}
    return [
        # Without noise the teacher is the model itself: steps before compression change nothing.
        _row("rate", "no noise", 0, compression_steps=steps),
        _row("rate", "no noise, all steps", 0, compression_steps=2 * steps),
        *(
            before("rate", series, p, noise=noise, p=p)
            for p in RATES
            for series, noise in noises.items()
        ),
        before("approximation", "mean", 0.3, noise="mean", p=0.3),
        *(
            before("approximation", f"{series}, clusters", 0.3, noise=noise, p=0.3,
                   block_selection="cluster")
            for series, noise in noises.items()
        ),
    ]  # fmt: skip


def centroids(steps: int) -> list[Row]:
    """Vary the number of centroids (figure 4)."""
    rows = []
    for count in (8, 16, 32, 64, 128, 256):
        stored = {"n_centroids": count}
        rows += [
            _row("centroids", "no noise", count, stored=stored, compression_steps=steps),
            _row("centroids", "trained noise", count, stored=stored, noise=LEARNED,
                 noise_steps=steps, **TRAINED_RATES),
        ]  # fmt: skip
    return rows


def blocks(steps: int) -> list[Row]:
    """Vary the block size of one group; the others have blocks of 4 (figure 6, right).

    Down projections, of 172 inputs, keep blocks of 4.
    """

    def sizes(group: str, size: int) -> dict:
        return {".*down_proj": 4, **dict.fromkeys(GROUPS, 4), group: size}

    return [
        _row("blocks", group, size, stored={"block_size": sizes(group, size)},
             compression_steps=steps)
        for size in (2, 8, 16)
        for group in GROUPS
    ]  # fmt: skip


def orders(steps: int) -> list[Row]:
    """Quantize the groups in each order (figure 6, left)."""
    return [
        _row("order", "staged", ", ".join(order), stored={"stages": list(order)},
             compression_steps=3 * (steps // 2))
        for order in itertools.permutations(GROUPS)
    ]  # fmt: skip


def integers(steps: int) -> list[Row]:
    """Round to int8 and int4 after training, in QAT and with noise (tables 1 and 10)."""
    rows = []
    for bits, observer in itertools.product((4, 8), ("minmax", "channel", "histogram")):
        stored = {"scheme": "fixed_point", "bits": bits, "observer": observer}
        axis = f"int{bits}"
        rows.append(Row(f"{axis} / after training / {observer}", SIZE, stored))
        for series, p in {"QAT": 1.0, "noise": 0.5}.items():
            rows.append(
                Row(f"{axis} / {series} / {observer}", SIZE, stored, {"p": p}, noise_steps=steps)
            )
    return rows


def ablations(model: str, steps: int | None) -> list[Row]:
    """Vary one setting at a time; of a part of stories260K only its size (figure 5)."""
    steps = STEPS if steps is None else steps
    if model != "stories":
        shape = model.partition("-")[2]
        return [
            _row("size", "no noise", shape, compression_steps=steps),
            _row("size", "trained noise", shape, noise=LEARNED, noise_steps=steps, **TRAINED_RATES),
        ]
    return [
        *rates(steps), *integers(steps), *centroids(steps), *blocks(steps), *orders(steps)
    ]  # fmt: skip
