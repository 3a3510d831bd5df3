"""Configuration of fixed-point quantization (section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import nn

from .checks import integer, one_of
from .options import documented, option
from .storage import OBSERVERS, SCHEMES, QuantizedModelConfig


@SCHEMES.register("fixed_point")
@documented
@dataclass(repr=False)
class FixedPointConfig(QuantizedModelConfig):
    """Settings of fixed-point scalar quantization (section 3.1, Eq. 2)."""

    bits: Annotated[int, integer(1, 8)] = option(8, "Bits per weight, 1 to 8.")
    observer: Annotated[str, one_of(OBSERVERS)] = option(
        "minmax",
        "Quantization range: 'minmax' (of the weight), 'channel' (one range per output feature or "
        "table row), 'histogram' (the range with the lowest squared error).",
    )

    scheme: ClassVar[str] = "fixed_point"

    def noise_settings(self, model: nn.Module | None = None) -> dict[str, Any]:
        noise = {"noise": f"int{self.bits}", "observer": self.observer}
        return {**noise, **super().noise_settings(model)}

    def quantizer_settings(self, layer: Any) -> dict[str, Any] | None:
        return {"scheme": "int", "bits": self.bits, "observer": self.observer}
