"""Logits of the teacher, kept from one epoch and stage to the next: it is frozen and in eval mode,
so the same inputs give the same outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from ...modeling.padding import IGNORED
from .logits import SPANS

logger = logging.get_logger(__name__)

Outputs = dict[str, Tensor]
_KEY_BYTES = 16
_SHAPES = ".shapes"
_LABELS = ("labels", "start_positions", "end_positions")


def _lengths(inputs: Mapping[str, Any], batch: int) -> list[int] | None:
    """Positions of each example up to its last token that is no padding or has a label; None where
    sequences have no mask of shape (batch, positions)."""
    mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    if mask is None or mask.dim() != 2 or any(name.startswith("decoder_") for name in inputs):
        return None
    used = mask.bool()
    if labels is not None and labels.shape == mask.shape:
        used = used | (labels != IGNORED)
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (used * places).amax(1).tolist()


class TeacherCache:
    """Keeps the logits of each example on the CPU, up to a size.

    The key of an example is a hash (128 bits) of the names, shapes, types and bytes of its input
    tensors without the padding at their end, so it does not depend on the batch; what stands for
    padding on the left belongs to it, for it moves the positions. Inputs that are drawn anew
    (augmented images, tokens masked at random) are other inputs: they are computed every time.

    Args:
        limit_mb: most that is kept, in 10^6 bytes; what comes later is computed every time.
        labels_are_inputs: of encoder-decoder models, which make the decoder's inputs of labels.

    Attributes:
        bytes: size of what is kept.
        asked, found: examples that were looked up, and those that were there.
    """

    def __init__(self, limit_mb: float, labels_are_inputs: bool = False) -> None:
        self.limit = limit_mb * 1e6
        self.labels_are_inputs = labels_are_inputs
        self.bytes = self.asked = self.found = 0
        self._computed = self._computed_bytes = 0
        self._entries: dict[bytes, Outputs] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def outputs(
        self, inputs: Mapping[str, Any], compute: Callable[[dict[str, Any]], Mapping[str, Any]]
    ) -> Outputs:
        """The logits of a batch; only the examples that are not kept are computed.

        Args:
            inputs: the batch; labels only say which positions are in use.
            compute: the teacher's forward.

        Returns:
            What the teacher names ``...logits``, on the device of the inputs, shape (batch, ...);
            zeros at the padding of examples that were found.
        """
        batch = next(len(x) for x in inputs.values() if isinstance(x, Tensor) and x.dim())
        lengths = None if self.labels_are_inputs else _lengths(inputs, batch)
        keys = [self._key(inputs, row, lengths) for row in range(batch)]
        rows: list[Outputs | None] = [self._entries.get(key) for key in keys]
        missing = [row for row, entry in enumerate(rows) if entry is None]
        self.asked += batch
        self.found += batch - len(missing)
        fresh: Outputs = {}
        if missing:
            computed = compute(_rows_of(inputs, missing, batch))
            fresh = {name: x.detach() for name, x in computed.items() if name.endswith("logits")}
        width = inputs["attention_mask"].shape[1] if lengths else None
        for place, row in enumerate(missing):
            rows[row] = {name: x[place] for name, x in fresh.items()}
            self._keep(keys[row], rows[row], lengths[row] if lengths else None, width)
        device = next(x.device for x in inputs.values() if isinstance(x, Tensor))
        return {
            name: torch.stack([_padded(name, row[name], width, device) for row in rows])
            for name in rows[0]
        }

    def require_room(self, examples: int) -> None:
        """Refuses to begin where the limit is below what the training data would take.

        Args:
            examples: in the training data; those looked up so far are typical of them.

        Raises:
            ValueError: naming the size it would take.
        """
        if not self._computed:
            return
        needed = self._computed_bytes / self._computed * examples / 1e6
        if needed * 1e6 > self.limit:
            raise ValueError(
                f"distill_cache: the teacher's logits for {examples} examples take about "
                f"{needed:.0f} MB, and distill_cache_mb={self.limit / 1e6:g}; raise it, or set "
                "distill_cache=False (the logits of language models are mostly too large to keep)"
            )

    def tensors(self) -> dict[str, Tensor]:
        """All that is kept, as the tensors of a file: ``keys`` (examples, 16), ``counts``, and of
        each output its numbers one after the other and, in ``<name>.shapes``, (examples, axes)."""
        rows = list(self._entries.values())
        keys = np.frombuffer(b"".join(self._entries), dtype=np.uint8).reshape(-1, _KEY_BYTES)
        counts = [self.asked, self.found, self._computed, self._computed_bytes]
        tensors = {"keys": torch.from_numpy(keys.copy()), "counts": torch.tensor(counts)}
        for name in rows[0] if rows else ():
            tensors[name] = torch.cat([row[name].reshape(-1) for row in rows])
            tensors[name + _SHAPES] = torch.tensor([row[name].shape for row in rows])
        return tensors

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Keeps what :meth:`tensors` gave, in place of what was kept, as far as the limit goes."""
        self.asked, self.found, self._computed, self._computed_bytes = tensors["counts"].tolist()
        self._entries, self.bytes = {}, 0
        columns = {
            name: _rows(tensors[name], tensors[name + _SHAPES])
            for name in tensors
            if name + _SHAPES in tensors
        }
        for place, key in enumerate(tensors["keys"]):
            row = {name: rows[place] for name, rows in columns.items()}
            size = _size(row)
            if self.bytes + size > self.limit:
                break
            self._entries[key.numpy().tobytes()] = row
            self.bytes += size

    def _key(self, inputs: Mapping[str, Any], row: int, lengths: list[int] | None) -> bytes:
        digest = hashlib.blake2b(digest_size=_KEY_BYTES)
        for name in sorted(inputs):
            value = inputs[name]
            if name in _LABELS and not self.labels_are_inputs:
                continue
            if isinstance(value, Tensor) and value.dim():
                value = _trimmed(value, row, inputs, lengths).detach().cpu().contiguous()
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                digest.update(f"{name} {value}".encode())
        return digest.digest()

    def _keep(self, key: bytes, row: Outputs, length: int | None, width: int | None) -> None:
        kept = {
            name: (x[:length] if _per_token(name, x, width) else x).to("cpu", copy=True)
            for name, x in row.items()
        }
        size = _size(kept)
        self._computed += 1
        self._computed_bytes += size
        if self.bytes + size > self.limit:
            logger.warning_once(
                f"distill_cache is full: {len(self)} examples in {self.bytes / 1e6:.1f} MB; the "
                "teacher runs for all others (distill_cache_mb is the limit)."
            )
            return
        if key not in self._entries:
            self._entries[key] = kept
            self.bytes += size


def _size(row: Outputs) -> int:
    return sum(x.numel() * x.element_size() for x in row.values())


def _rows(numbers: Tensor, shapes: Tensor) -> list[Tensor]:
    parts = numbers.clone().split(shapes.prod(1).tolist())  # of no file, which will be removed
    return [part.view(shape) for part, shape in zip(parts, shapes.tolist(), strict=True)]


def _trimmed(
    value: Tensor, row: int, inputs: Mapping[str, Any], lengths: list[int] | None
) -> Tensor:
    is_sequence = lengths is not None and value.shape[:2] == inputs["attention_mask"].shape
    return value[row][: lengths[row]] if is_sequence else value[row]


def _rows_of(inputs: Mapping[str, Any], rows: list[int], batch: int) -> dict[str, Any]:
    if len(rows) == batch:
        return dict(inputs)
    return {
        name: x[rows] if isinstance(x, Tensor) and x.dim() and len(x) == batch else x
        for name, x in inputs.items()
    }


def _per_token(name: str, row: Tensor, width: int | None) -> bool:
    return width is not None and (row.dim() > 1 or name in SPANS)


def _padded(name: str, row: Tensor, width: int | None, device: torch.device) -> Tensor:
    row = row.to(device)
    if not _per_token(name, row, width) or len(row) >= width:
        return row
    whole = row.new_zeros(width, *row.shape[1:])
    whole[: len(row)] = row
    return whole
