"""Configuration of a compressed model: how its weights are stored (section 3).

After compression these configs, with the plan, are the ``quantization_config`` of ``config.json``.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..argument_checks import require_instance
from ..registry import Registry
from ..structure import GROUPS
from ..version import QUANT_METHOD as QUANT_METHOD
from ..version import __version__
from .checks import (
    by_layer,
    integer,
    invalid,
    is_int,
    layer_chunks,
    layer_name,
    one_of,
    patterns,
    reason,
)
from .entries import plan_entries
from .hub_files import HubConfigMixin
from .layer_storage import stored_layers
from .options import Options, documented, from_file, option

# Layout on disk -> the first version of the package that reads it.
FORMATS = {1: "0.1.0", 2: "0.2.0"}
FORMAT_VERSION = max(FORMATS)
# Keys that are written into config.json next to the fields, partly for people who open it.
HEAD = ("quant_method", "scheme", "how_to_load", "requires")
# Fields that compression fills in.
RECORDS = ("plan", "left_dense", "shared_layers", "pruned_layers", "weights_id")

SCHEMES: Registry[type] = Registry("scheme")
OBSERVERS: Registry = Registry("observer", filled_by="quantizers")


def check_format(version: Any, requires: object = None) -> None:
    """Raise a ``ValueError`` if this version of the package cannot read a layout.

    It names the command that installs a newer one, with ``requires`` of the file if that is a plain
    requirement.
    """
    if not is_int(version) or version < 1:
        raise invalid("format_version", version, "a positive integer")
    if version > FORMAT_VERSION:
        plain = re.fullmatch(r"hf-quantnoise>=[\w.]+", str(requires))
        raise ValueError(
            f"format_version={version} was written by a newer hf_quantnoise; this version, "
            f"{__version__}, reads up to {FORMAT_VERSION}; install it with pip install -U "
            + (f"'{requires}'" if plain else "hf-quantnoise")
        )


@documented
@dataclass(repr=False)
class QuantizedModelConfig(HubConfigMixin, Options, QuantizationConfigMixin):
    """Base of the quantization configs of all schemes."""

    keywords_only: ClassVar[bool] = True

    target_modules: Annotated[str | list[str] | None, patterns] = option(
        None, "Layers to quantize: a regex for full names, or a list of names and suffixes."
    )
    exclude_modules: Annotated[str | list[str] | None, patterns] = option(
        None, "Layers to keep dense; same form as target_modules."
    )
    leftover_bits: Annotated[int, one_of((32, 16, 8))] = option(
        8,
        "Bits per value of everything that no stage packs. 8: layers are stored as int8 with a "
        "scale per row, all other tensors (biases, norms) in float16. 16: all in float16. 32: as "
        "they are. Excluded layers and {'scheme': 'dense'} entries are unchanged.",
    )
    activation_bits: Annotated[int | None, integer(1, 8)] = option(
        None,
        "Bits, 1 to 8, that the inputs of quantized layers are rounded to (sections 3.3 and 7.7). "
        "The scale is found by the histogram method on calibration data (the first training "
        "batches of a stage, or those passed to quantize_model), then fixed and saved. None: no "
        "rounding.",
    )
    share_layers: Annotated[int | list[list[str]] | None, layer_chunks] = option(
        None,
        "Number of adjacent layers that share one set of weights, on disk and in memory (section "
        "7.9); or a list of chunks, each a list of layer names. None: as in training with noise.",
    )
    prune_layers: Annotated[str | list[str] | None, patterns] = option(
        None,
        "Layers to remove before quantization: 'every_other' chunk of shared layers (or layer, if "
        "none are shared; the first stays), a regex for full names, or a list of names and "
        "suffixes. The config of the model is adapted to the remaining layers.",
    )
    seed: Annotated[int, integer(0, 2**63 - 1)] = option(0, "Seed of the codebooks.")
    plan: Annotated[dict[str, dict[str, Any]], plan_entries] = option(
        {}, "Filled in by compression: layer name -> how it is stored."
    )
    left_dense: Annotated[dict[str, str], by_layer(reason)] = option(
        {},
        "Filled in by compression: name of a layer or parameter that no stage packs -> why. Those "
        "that are stored as int8 (leftover_bits=8) are in plan, too.",
    )
    shared_layers: Annotated[dict[str, str], by_layer(layer_name)] = option(
        {}, "Filled in by compression: layer -> the layer that holds its weights."
    )
    pruned_layers: Annotated[dict[str, int], by_layer(integer(0, 2**63 - 1))] = option(
        {}, "Filled in by compression: removed layer -> number of weights it had."
    )
    weights_id: str | None = option(
        None,
        "Filled in by saving: a checksum of the weights. Each file of weights has it too, so that "
        "files of different saves are not loaded together.",
    )
    format_version: int = option(
        FORMAT_VERSION,
        "Version of the layout on disk; saving writes the newest. If it is newer than the "
        "package, an error names the version to install.",
    )

    scheme: ClassVar[str] = ""
    quant_method: ClassVar[str] = QUANT_METHOD  # type: ignore[assignment, misc]
    file_name: ClassVar[str] = "quantization_config.json"

    def __post_init__(self) -> None:
        check_format(self.format_version)
        super().__post_init__()
        for name, entry in self.plan.items():
            if entry.get("activation_bits") not in (None, self.activation_bits):
                raise invalid(
                    f"plan[{name!r}]: activation_bits",
                    entry["activation_bits"],
                    f"{self.activation_bits!r}, as activation_bits of the config, or none; restore "
                    "the original file",
                )

    def clear_records(self) -> None:
        """Reset the fields that compression fills in."""
        empty = self.from_dict({})
        for name in RECORDS:
            setattr(self, name, getattr(empty, name))

    @property
    def weighs_errors(self) -> bool:
        """Whether quantization errors are weighted by the layer's inputs on calibration data."""
        return False

    @property
    def reads_data(self) -> str | None:
        """Name of the field that needs calibration data, or None."""
        return self.reads_inputs or self.counts_lookups

    @property
    def reads_inputs(self) -> str | None:
        """Name of the field that needs the inputs of layers, on calibration data, or None."""
        if self.weighs_errors:
            return "importance"
        return None if self.activation_bits is None else "activation_bits"

    @property
    def counts_lookups(self) -> str | None:
        """Name of the field that needs the number of lookups of each row of a table, or None."""
        return None

    def noise_settings(self, model: nn.Module | None = None) -> dict[str, Any]:
        """Return the fields of a :class:`QuantNoiseConfig` with the same blocks.

        With a model, layers that no stage packs are excluded, and those that
        :meth:`noise_is_like` excludes.
        """
        names = ("activation_bits", "target_modules", "exclude_modules", "seed")
        settings = {name: getattr(self, name) for name in names}
        if model is not None:
            packed, dense = stored_layers(self, model)
            unlike = [name for name, own in packed.items() if not self.noise_is_like(own)]
            settings["exclude_modules"] = "|".join(map(re.escape, [*dense, *unlike])) or None
        return {**settings, "share_layers": 1 if self.share_layers is None else self.share_layers}

    def noise_is_like(self, quantizer: Any) -> bool:
        """Return whether noise of this config resembles what a quantizer does to a layer."""
        return True

    def quantizer_settings(self, layer: Any) -> dict[str, Any] | None:
        """Return the quantizer settings of a layer, or None if the config does not cover it."""
        raise NotImplementedError

    def settings_by_name(self) -> dict[str, dict[str, Any]]:
        """Return layer name -> settings of the layers that are configured by name."""
        return {}

    @property
    def target(self) -> str | None:
        """The target size as ``"field=value"``, or None."""
        return None

    @property
    def has_default_stages(self) -> bool:
        """Whether the stages follow from the model, so that none of them has to pack a layer."""
        return False

    def stage_groups(self, groups: Collection[str] = GROUPS) -> list[str | None]:
        """Return the stages in order: structure groups or regexes; None means all layers.

        ``groups`` are those that the model has.
        """
        return [None]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict: all fields, quantization method, scheme and how to load it."""
        how_to_load = "pip install hf-quantnoise, and import hf_quantnoise before loading"
        requires = f"hf-quantnoise>={FORMATS[FORMAT_VERSION]}"
        head = dict(zip(HEAD, (QUANT_METHOD, self.scheme, how_to_load, requires), strict=True))
        return {**head, **asdict(self), "format_version": FORMAT_VERSION}

    def restore_old_defaults(self) -> None:
        """Give what releases before ``leftover_bits`` did not save the meaning it had there."""
        self.leftover_bits = 32

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the config of :meth:`to_dict`, of any scheme; unknown fields raise an error."""
        require_instance(cls.__name__, config_dict, dict, "a dict of its fields", "see to_dict()")
        # First: a newer format may have schemes and fields that are unknown here.
        check_format(config_dict.get("format_version", FORMAT_VERSION), config_dict.get("requires"))
        values = {key: value for key, value in config_dict.items() if key not in HEAD}
        target = SCHEMES[config_dict.get("scheme", cls.scheme)]
        config = from_file(target, values)
        if "format_version" in config_dict and "leftover_bits" not in config_dict:
            config.restore_old_defaults()
        return (config, kwargs) if return_unused_kwargs else config
