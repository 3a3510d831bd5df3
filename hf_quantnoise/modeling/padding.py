"""Which positions of a running batch are padding, for who looks at what enters its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100  # the label of a position that is in no loss


class PaddingMasks:
    """The masks of a batch while a model runs it.

    Most models have one, ``attention_mask``. In an encoder-decoder model it is that of what goes
    through the encoder and of what the encoder gives, which cross-attention reads as well; all else
    has the mask of the decoder. Labels give that one where the batch does not, up to the last
    that is not -100; where the batch has neither, decoder inputs are made of the encoder's.

    Args:
        model: watched in the context of this object.
    """

    def __init__(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        decodes = getattr(config, "is_encoder_decoder", False)
        self._encoder: nn.Module | None = model.get_encoder() if decodes else None
        self._in_encoder = False
        self._encoded: Tensor | None = None
        self._source: Tensor | None = None
        self._target: Tensor | None = None
        self._hooks: list = []

    def __enter__(self) -> PaddingMasks:
        if self._encoder is not None:
            self._hooks = [
                self._encoder.register_forward_pre_hook(self._enters),
                self._encoder.register_forward_hook(self._leaves),
            ]
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enters(self, *_) -> None:
        self._in_encoder = True

    def _leaves(self, encoder: nn.Module, args: tuple, output: Any) -> None:
        self._in_encoder, self._encoded = False, output[0]

    def begin(self, batch: object) -> None:
        """Before a batch is run; what is no mapping has no masks."""
        batch = batch if isinstance(batch, Mapping) else {}
        self._source, self._encoded = _matrix(batch.get("attention_mask")), None
        self._target = None if self._encoder is None else _decoder_mask(batch)

    def without_padding(self, inputs: Tensor) -> Tensor:
        """The rows of (batch, positions, ...) that are no padding, one after the other; inputs of
        another shape, or without a mask, as they are."""
        mask = self._target
        if self._encoder is None or self._in_encoder or self._is_encoded(inputs):
            mask = self._source
        if mask is None or inputs.shape[:2] != mask.shape:
            return inputs
        return inputs[mask.to(inputs.device).bool()]

    def _is_encoded(self, inputs: Tensor) -> bool:
        encoded = self._encoded
        return (
            encoded is not None
            and inputs.shape == encoded.shape
            and inputs.data_ptr() == encoded.data_ptr()
        )


def _matrix(mask: Any) -> Tensor | None:
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _decoder_mask(batch: Mapping[str, Any]) -> Tensor | None:
    if "decoder_attention_mask" in batch:
        return _matrix(batch["decoder_attention_mask"])
    labels = _matrix(batch.get("labels"))
    if labels is not None and labels.dtype == torch.long:
        used = (labels != IGNORED).long()
        return used.flip(1).cummax(1).values.flip(1)
    given = "decoder_input_ids" in batch or "decoder_inputs_embeds" in batch
    return None if given else _matrix(batch.get("attention_mask"))
