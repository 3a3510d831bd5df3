"""Padding masks of a running batch, for statistics over the inputs of layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100  # the label of a position without loss


class PaddingMasks:
    """The masks of a batch while a model runs it, inside the context of this object.

    Most models have one, ``attention_mask``. In an encoder-decoder model this is the mask of the
    encoder and of its output, which cross-attention reads; the decoder has its own mask. If the
    batch lacks the decoder's mask, it is derived from the labels (up to the last one that is not
    -100). If it has neither, decoder inputs are made from those of the encoder and share its mask.
    """

    def __init__(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        has_decoder = getattr(config, "is_encoder_decoder", False)
        self._encoder: nn.Module | None = model.get_encoder() if has_decoder else None
        self._in_encoder = False
        self._encoded: Tensor | None = None
        self._source: Tensor | None = None
        self._target: Tensor | None = None
        self._hooks: list = []

    def __enter__(self) -> PaddingMasks:
        if self._encoder is not None:
            self._hooks = [
                self._encoder.register_forward_pre_hook(self._enter_encoder),
                self._encoder.register_forward_hook(self._leave_encoder),
            ]
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter_encoder(self, *_) -> None:
        self._in_encoder = True

    def _leave_encoder(self, encoder: nn.Module, args: tuple, output: Any) -> None:
        self._in_encoder, self._encoded = False, output[0]

    def begin(self, batch: object) -> None:
        """Read the masks of a batch before it is run; a batch that is not a mapping has none."""
        batch = batch if isinstance(batch, Mapping) else {}
        self._source, self._encoded = _matrix(batch.get("attention_mask")), None
        self._target = None if self._encoder is None else _decoder_mask(batch)

    def without_padding(self, inputs: Tensor) -> Tensor:
        """Return the rows of (batch, positions, ...) that are not padding, one after the other.

        Inputs of another shape, or without a mask, are returned unchanged.
        """
        mask = self._target
        if self._encoder is None or self._in_encoder or self._is_encoded(inputs):
            mask = self._source
        if mask is None or inputs.shape[:2] != mask.shape:
            return inputs
        return inputs[mask.to(inputs.device).bool()]

    def _is_encoded(self, inputs: Tensor) -> bool:
        if (encoded := self._encoded) is None or inputs.shape != encoded.shape:
            return False
        return inputs.data_ptr() == encoded.data_ptr()


def tensor_labels(batch: Mapping[str, Any]) -> Tensor | None:
    """Return the labels of a batch; None without any, or if they are a dict per example (boxes)."""
    labels = batch.get("labels")
    return labels if isinstance(labels, Tensor) else None


def _matrix(mask: Any) -> Tensor | None:
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _decoder_mask(batch: Mapping[str, Any]) -> Tensor | None:
    if "decoder_attention_mask" in batch:
        return _matrix(batch["decoder_attention_mask"])
    labels = _matrix(batch.get("labels"))
    if labels is not None and labels.dtype == torch.long:
        used = (labels != IGNORED).long()
        return used.flip(1).cummax(1).values.flip(1)
    has_inputs = "decoder_input_ids" in batch or "decoder_inputs_embeds" in batch
    return None if has_inputs else _matrix(batch.get("attention_mask"))
