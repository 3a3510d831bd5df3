"""Codebooks and codes that noise was fitted to, from which the quantization of a weight starts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..quantizers import Quantizer
from .plan import PlannedWeight

logger = logging.get_logger(__name__)

MAX_NAMED = 3  # layers in a warning


@dataclass(frozen=True)
class FittedWeight:
    """Codebooks, and trained codes, of the noise of one weight.

    Attributes:
        quantizer: the quantizer of the noise.
        state: its state.
        codes: the codes if the state was trained together with the weight, else None.
        checksum: of the weight that has these codes; None without codes.
    """

    quantizer: Quantizer
    state: dict[str, Tensor]
    codes: Tensor | None
    checksum: str | None

    @classmethod
    def of(
        cls, layer: Any, quantizer: Quantizer, state: dict[str, Tensor], codes: Tensor | None
    ) -> FittedWeight:
        """Return the same for the present weight of a layer."""
        return cls(quantizer, state, codes, None if codes is None else _checksum(layer.weight))

    def for_weight(self, weight: Tensor) -> FittedWeight:
        """Return the same without the codes if a weight was changed since they were assigned."""
        if self.codes is None or self.checksum == _checksum(weight):
            return self
        return replace(self, codes=None, checksum=None)

    def why_not(self, planned: Any) -> str | None:
        """Return why packing with another quantizer cannot start from this one, or None."""
        own: Any = self.quantizer
        if planned.has_codebook:
            own = replace(own, n_iter=planned.n_iter)
            if self.codes is None:  # a start of k-means, which rounds by its own settings
                own = replace(own, codebook_bits=planned.codebook_bits)
        if own == planned:  # dataclasses of other classes differ
            return None
        return f"its noise is {own.short_name}, and it is stored as {planned.short_name}"


def _checksum(weight: Tensor) -> str:
    values = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy()).hexdigest()


class FittedWeights(dict[nn.Module, FittedWeight]):
    """The first layer that holds a weight -> what its noise was fitted to."""

    def start_of(self, planned: PlannedWeight) -> FittedWeight | None:
        """Return what the quantization of a weight starts from, if its noise fits.

        Codes are those of the present weight: the finetuning of earlier stages may have changed it.
        """
        fitted = self._of(planned)
        if fitted is None or fitted.why_not(planned.quantizer):
            return None
        module: Any = planned.modules[0]
        return fitted.for_weight(module.weight)

    def _of(self, planned: PlannedWeight) -> FittedWeight | None:
        return next((self[module] for module in planned.modules if module in self), None)

    def report(self, weights: Sequence[PlannedWeight]) -> None:
        """Log how many weights start from their noise; warn if trained centroids are not used."""
        found = {planned.layers[0].name: self._of(planned) for planned in weights}
        reasons = {
            planned.layers[0].name: reason
            for planned in weights
            if (fitted := found[planned.layers[0].name]) is not None
            and (reason := fitted.why_not(planned.quantizer))
        }
        n_used = sum(each is not None for each in found.values()) - len(reasons)
        if n_used:
            logger.info(f"{n_used} of {len(weights)} weights start from the centroids of the noise")
        lost = [name for name in reasons if found[name].codes is not None]
        if lost:
            named = "; ".join(f"{name}: {reasons[name]}" for name in lost[:MAX_NAMED])
            logger.warning(
                f"the trained centroids of {len(lost)} weights are not used ({named}"
                f"{'; ...' if len(lost) > MAX_NAMED else ''}); train with "
                "QuantNoiseConfig.matching(config, model, ...)"
            )
