"""Rows of ``language_model.py``: how each one spends its steps, and how the model is stored."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

JOINT = {"stages": [".*"]}  # one stage for all layers
LEARNED = {"noise": "pq", "p": 1.0, "learn_codebooks": True, "codebook_update": 1}
# What the study of settings chose: learning rates of weights and of centroids.
TRAINED_RATES = {"learning_rate": 8e-3, "codebook_learning_rate": 5e-3}  # stories
LLAMA_RATES = {"learning_rate": 5e-4, "codebook_learning_rate": 5e-4}


@dataclass(frozen=True)
class Row:
    """One way to compress the float32 model.

    Attributes:
        method: name of the row.
        size: how many times smaller the file is, roughly.
        stored: fields of the ``IPQConfig`` (or, with ``scheme`` "fixed_point", of that config).
        noise: fields of the ``QuantNoiseConfig``; None trains without noise.
        noise_steps: optimizer steps before compression.
        compression_steps: optimizer steps of all compression stages together.
        distilled: whether the steps before compression have a teacher; otherwise labels.
        splits: text to evaluate.
    """

    method: str
    size: str | None
    stored: dict[str, Any]
    noise: dict[str, Any] | None = None
    noise_steps: int = 0
    compression_steps: int = 0
    distilled: bool = True
    learning_rate: float = 2e-3
    codebook_learning_rate: float = 1e-2
    splits: tuple[str, ...] = field(default=("held_out", "dev"))

    @property
    def staged(self) -> bool:
        """Whether the groups of layers are quantized one after the other."""
        return "stages" not in self.stored or len(self.stored["stages"]) > 1

    def setting(self) -> dict[str, Any]:
        """Return what defines the run, for its key."""
        values = asdict(self)
        for name in ("method", "size", "splits"):
            del values[name]
        return values


# How a model is stored, by its name and size: bits are allocated, megabytes of the file given.
# Codebooks have 16 bits: 8-bit centroids of weights as small as those of stories260K (64 x 64) save
# less than their scales and names take.
LEFTOVERS = {"codebook_bits": 16, "leftover_bits": 8}
ALLOCATED = {**LEFTOVERS, "importance": "activations"}
MEGABYTES = {
    "stories": {"8x": 0.13, "11x": 0.095, "15x": 0.069},
    "llama": {"15x": 1.36, "25x": 0.81},
}
STEPS = {"stories": 600, "llama": 600}


def _llama_arms(size: str, stored: dict, steps: int) -> list[Row]:
    """Return the arms of the larger model, each with the same number of steps."""
    joint = {**stored, **JOINT}
    return [
        Row("one shot", size, joint),
        Row("joint, no noise", size, joint, compression_steps=steps, codebook_learning_rate=1e-3),
        Row("trained noise", size, joint, LEARNED, noise_steps=steps, **LLAMA_RATES),
    ]


def _stories_arms(size: str, stored: dict, steps: int) -> list[Row]:
    """Return all arms of one size, each with the same number of steps."""
    half, joint = steps // 2, {**stored, **JOINT}
    finetuned = {"noise_steps": half, "compression_steps": steps - half}
    return [
        Row("one shot", size, joint),
        Row("staged, no noise", size, stored, compression_steps=steps),
        Row("joint, no noise", size, joint, compression_steps=steps),
        Row("joint, proxy noise p=0.1", size, joint, {"noise": "proxy", "p": 0.1}, **finetuned),
        Row("joint, exact noise p=0.3", size, joint, {"noise": "pq", "p": 0.3}, **finetuned),
        Row("trained noise", size, joint, LEARNED, noise_steps=steps, **TRAINED_RATES),
        Row("trained noise, p rises", size, joint, {**LEARNED, "p_schedule": half},
            noise_steps=steps, **TRAINED_RATES),
    ]  # fmt: skip


def main_study(model: str, steps: int | None) -> list[Row]:
    """Compare noise with none, at each size."""
    steps = STEPS[model] if steps is None else steps
    arms = {"stories": _stories_arms, "llama": _llama_arms}[model]
    return [
        row
        for size, megabytes in MEGABYTES[model].items()
        for row in arms(size, {**ALLOCATED, "target_size_mb": megabytes}, steps)
    ]


# Blocks without bit allocation, near 15 times smaller.
EVEN = {
    "blocks of 2": {
        "block_size": 2, "n_centroids": {"embeddings": 16, "ffn": 8, "attention": 16},
    },
    "blocks of 4": {
        "block_size": 4, "n_centroids": {"embeddings": 64, "ffn": 32, "attention": 32},
    },
}  # fmt: skip


def _tried(stored: tuple[str, dict], rate: float, centroids: float, **fields: Any) -> Row:
    """Return a row of the study of settings; its name has the rates."""
    name, storage = stored
    noise = fields.get("noise")
    arm = "no noise" if noise is None else f"noise, codes every {noise['codebook_update']}"
    if noise is not None and "compression_steps" in fields:
        arm += ", then fixed"
    return Row(
        f"{arm}, {name}, rates {rate:g}, {centroids:g}", "15x", {**storage, **JOINT},
        learning_rate=rate, codebook_learning_rate=centroids, splits=("held_out",), **fields,
    )  # fmt: skip


def settings(model: str, steps: int | None) -> list[Row]:
    """Choose learning rates and how the bytes are spent, on the held-out text."""
    steps = STEPS[model] // 4 if steps is None else steps
    allocated = ("bits allocated", {**ALLOCATED, "target_size_mb": MEGABYTES[model]["15x"]})

    def trained(every: int, rate: float, centroids: float, stored: tuple[str, dict]) -> Row:
        noise = {**LEARNED, "codebook_update": every}
        return _tried(stored, rate, centroids, noise=noise, noise_steps=steps)

    rows = [
        trained(every, rate, centroids, allocated)
        for every, rate, centroids in (
            (20, 5e-4, 5e-3), (20, 1e-3, 5e-3),
            (5, 5e-4, 5e-3), (5, 1e-3, 5e-3), (5, 2e-3, 5e-3), (5, 4e-3, 5e-3), (5, 8e-3, 5e-3),
            (5, 1e-3, 1e-2), (5, 1e-3, 2e-3), (5, 1e-3, 5e-4), (5, 5e-4, 5e-4), (5, 5e-4, 2e-4),
            (5, 2e-4, 5e-4),
            (2, 4e-3, 5e-3),
            (1, 2e-4, 5e-3), (1, 5e-4, 5e-3), (1, 2e-3, 5e-3), (1, 4e-3, 5e-3), (1, 8e-3, 5e-3),
            (1, 2e-4, 2e-4), (1, 5e-4, 5e-4), (1, 4e-3, 2e-3), (1, 4e-3, 5e-4),
            (1, 8e-3, 1e-3), (1, 8e-3, 5e-4),
        )
    ]  # fmt: skip
    rows += [
        _tried(allocated, rate, centroids, compression_steps=steps)
        for rate, centroids in (
            (5e-4, 5e-3),
            (5e-4, 2e-2),
            (2e-3, 2e-4),
            (2e-3, 5e-4),
            (2e-3, 1e-3),
            (2e-3, 5e-3),
            (2e-3, 1e-2),
        )
    ]
    halves = {"noise_steps": steps // 2, "compression_steps": steps - steps // 2}
    rows.append(_tried(allocated, 4e-3, 5e-3, noise={**LEARNED, "codebook_update": 5}, **halves))
    if model == "stories":
        rows += [trained(20, 5e-4, 5e-3, (n, {**LEFTOVERS, **s})) for n, s in EVEN.items()]
    return rows
