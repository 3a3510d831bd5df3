"""How a compressed model is stored (section 3).

The configs here are what ``config.json`` holds as ``quantization_config`` after compression, the
plan included.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..registry import Registry
from ..structure import GROUPS, block_size_of, entry_for
from ..validation import (
    check_bool,
    check_choice,
    check_int,
    check_patterns,
    check_per_layer,
    check_regex,
    check_share_layers,
    is_int,
    reject_unknown,
)
from ..version import __version__
from .hub_files import HubConfigMixin
from .layer_quantizers import MAX_BLOCK_SIZE, MAX_CENTROIDS, check_target, checked_layer_quantizers

QUANT_METHOD = "hf_quantnoise"
# Layout on disk -> the first version of the package that reads it.
FORMATS = {1: "0.1.0"}
FORMAT_VERSION = max(FORMATS)
# For whoever opens a config.json and wonders; it is written and never read.
LOAD_HINT = "pip install hf-quantnoise, and import hf_quantnoise before loading"
HEAD = ("quant_method", "scheme", "how_to_load", "requires")

SCHEMES: Registry[type] = Registry("scheme")
OBSERVERS: Registry = Registry("observer")


def check_format(version: object, requires: object = None) -> None:
    """Refuses a layout that this version of the package does not read.

    Args:
        version: ``format_version`` of the file.
        requires: what the file says it needs; put into the error where it is a plain requirement.
    """
    if not is_int(version) or version < 1:
        raise ValueError(f"format_version={version!r} must be a positive integer")
    if version > FORMAT_VERSION:
        plain = re.fullmatch(r"hf-quantnoise>=[\w.]+", str(requires))
        raise ValueError(
            f"format_version={version} was written by a newer hf_quantnoise; this one, "
            f"{__version__}, reads up to {FORMAT_VERSION}. Install it with: pip install -U "
            + (f"'{requires}'" if plain else "hf-quantnoise")
        )


@dataclass(repr=False)
class QuantizedModelConfig(HubConfigMixin, QuantizationConfigMixin):
    """What every quantized model's ``quantization_config`` holds, whatever its scheme.

    Args:
        target_modules: which layers to quantize (regex, or list of exact names and suffixes).
        exclude_modules: which of them to leave dense.
        activation_bits: bits, 1 to 8, that what enters a quantized layer is rounded to (7.7), with
            a scale found on calibration data; None leaves activations in floating point.
        share_layers: adjacent layers share their weights in chunks of n, stored once (7.9); or a
            list of chunks, each a list of layer names. None shares what the model's noise shared.
        prune_layers: layers that are taken out first: ``"every_other"`` chunk (or layer, where none
            are shared), the second first; or a regex for whole layer names, or a list of exact
            names and suffixes.
        seed: seed of the codebooks.
        plan: after compression, layer name -> how it is stored. Filled by the package.
        left_dense: after compression, name of a layer or bare parameter -> why it is stored in
            floating point.
        shared_layers: after compression, layer -> the layer whose weights it holds.
        pruned_layers: after compression, name of each layer taken out -> weights it had.
        format_version: version of the layout on disk.
    """

    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    activation_bits: int | None = None
    share_layers: int | list[list[str]] | None = None
    prune_layers: str | list[str] | None = None
    seed: int = 0
    plan: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_dense: dict[str, str] = field(default_factory=dict)
    shared_layers: dict[str, str] = field(default_factory=dict)
    pruned_layers: dict[str, int] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    scheme: ClassVar[str] = ""
    quant_method: ClassVar[str] = QUANT_METHOD
    file_name: ClassVar[str] = "quantization_config.json"

    def __post_init__(self) -> None:
        check_format(self.format_version)
        if self.activation_bits is not None:
            check_int("activation_bits", self.activation_bits, 1, 8)
        if self.share_layers is not None:
            check_share_layers("share_layers", self.share_layers)
        check_patterns("prune_layers", self.prune_layers)
        check_int("seed", self.seed, 0, 2**63 - 1)
        check_patterns("target_modules", self.target_modules)
        check_patterns("exclude_modules", self.exclude_modules)

    @property
    def weighs_errors(self) -> bool:
        """Whether a weight's error counts by what its layer's inputs are on calibration data."""
        return False

    @property
    def reads_data(self) -> str | None:
        """The field that needs calibration data, or None."""
        if self.weighs_errors:
            return "importance"
        return None if self.activation_bits is None else "activation_bits"

    @property
    def is_compressed(self) -> bool:
        """Whether the config describes a finished model (it holds a plan)."""
        return bool(self.plan)

    def noise_settings(self) -> dict[str, Any]:
        """The fields of the :class:`QuantNoiseConfig` with this target's blocks."""
        raise NotImplementedError

    def _shared_with_noise(self) -> dict[str, Any]:
        names = ("activation_bits", "target_modules", "exclude_modules", "seed")
        shared = 1 if self.share_layers is None else self.share_layers
        return {**{name: getattr(self, name) for name in names}, "share_layers": shared}

    def quantizer_settings(self, layer) -> dict[str, Any] | None:
        """Settings of the quantizer for a layer, or None where this config does not cover it."""
        raise NotImplementedError

    def settings_by_name(self) -> dict[str, dict[str, Any]]:
        """Layer name -> settings, of the layers that the config names one by one."""
        return {}

    @property
    def target(self) -> str | None:
        """The size that is asked for, in words; None where none is."""
        return None

    def stage_groups(self) -> list[str | None]:
        """The stages in order: a structure group or regex each; None takes all layers."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict: all fields, the quantization method, the scheme and how to load it."""
        requires = f"hf-quantnoise>={FORMATS[self.format_version]}"
        head = dict(zip(HEAD, (QUANT_METHOD, self.scheme, LOAD_HINT, requires), strict=True))
        return {**head, **asdict(self)}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs=False, **kwargs):
        """The inverse of :meth:`to_dict`, for any scheme; unknown fields are refused."""
        # A newer format may bring schemes and fields of its own: say that it is newer, not that
        # they are odd.
        check_format(config_dict.get("format_version", FORMAT_VERSION), config_dict.get("requires"))
        values = {key: value for key, value in config_dict.items() if key not in HEAD}
        target = SCHEMES[config_dict.get("scheme", cls.scheme)]
        reject_unknown(target, values)
        config = target(**values)
        return (config, kwargs) if return_unused_kwargs else config


def _for_all_groups(value: int | dict[str, int]) -> dict[str, int]:
    return value if isinstance(value, dict) else dict.fromkeys(GROUPS, value)


@SCHEMES.register("ipq")
@dataclass(repr=False)
class IPQConfig(QuantizedModelConfig):
    """Iterative product quantization (section 3.2).

    Args:
        block_size: numbers per block, or a dict from structure group or regex for layer names to
            it. The paper has 4 for RoBERTa, and 8 (FFN), 8 (embeddings), 4 (attention) for language
            models (section 7.8).
        n_centroids: codewords per codebook, 2 to 65,536; 256 gives one byte per block. An int or a
            dict like ``block_size``.
        stages: structure groups (or regexes) in the order in which they are quantized.
            Layers of no stage stay in floating point.
        codebook_bits: 32, 16 or 8, the precision in which centroids are stored; 8 is section 3.3,
            Eq. 2 on the codebook.
        kmeans_iter: most iterations of k-means for each codebook.
        importance: ``"none"``, or ``"activations"``: k-means weighs the error of each number by the
            squares of what it is multiplied with on calibration data (diagonal of X^T X).
        row_scale: whether each row of a weight (an output feature, a word) has a float16 scale,
            fitted along with the codebook and trained with it.
        n_codebooks: 1, or 2: a block is the sum of a centroid of each of two codebooks of
            ``n_centroids``, stored as two codes. Blocks of 8 then take the codes of blocks of 4.
        target_size_mb: the saved file may have so many MB (10^6 bytes); block size, number of
            centroids or intN are then chosen for each weight
            (``compression/bit_allocation/allocate.py``).
        target_bits_per_weight: the same in bits for each parameter of the model.
        layer_quantizers: layer name -> how it is stored, e.g. ``{"scheme": "int", "bits": 4}``; it
            overrules the fields above. A target fills it in; given, nothing is allotted anew.
    """

    block_size: int | dict[str, int] = 4
    n_centroids: int | dict[str, int] = 256
    stages: list[str] | tuple[str, ...] = ("ffn", "embeddings", "attention")
    codebook_bits: int = 32
    kmeans_iter: int = 20
    importance: str = "none"
    row_scale: bool = False
    n_codebooks: int = 1
    target_size_mb: float | None = None
    target_bits_per_weight: float | None = None
    layer_quantizers: dict[str, dict[str, Any]] = field(default_factory=dict)

    scheme: ClassVar[str] = "ipq"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_per_layer("block_size", self.block_size, 1, MAX_BLOCK_SIZE)
        check_per_layer("n_centroids", self.n_centroids, 2, MAX_CENTROIDS)
        check_choice("codebook_bits", self.codebook_bits, (32, 16, 8))
        check_int("kmeans_iter", self.kmeans_iter, 1, 100_000)
        check_choice("importance", self.importance, ("none", "activations"))
        check_bool("row_scale", self.row_scale)
        check_choice("n_codebooks", self.n_codebooks, (1, 2))
        if isinstance(self.stages, str) or not self.stages:
            raise ValueError(
                f"stages={self.stages!r} must be a list of structure groups ({', '.join(GROUPS)}) "
                "or regexes for layer names"
            )
        for stage in self.stages:
            check_regex("stages", stage)
        if len(set(self.stages)) != len(self.stages):
            raise ValueError(f"stages={self.stages!r} names a stage twice")
        self.stages = list(self.stages)
        for name in ("block_size", "n_centroids"):
            self._check_covers_stages(name, getattr(self, name))
        targets = ("target_size_mb", "target_bits_per_weight")
        for name in targets:
            check_target(name, getattr(self, name))
        if all(getattr(self, name) is not None for name in targets):
            raise ValueError(
                f"target_size_mb={self.target_size_mb!r} and "
                f"target_bits_per_weight={self.target_bits_per_weight!r} both say how large the "
                "file may be; give one of them"
            )
        self.layer_quantizers = checked_layer_quantizers("layer_quantizers", self.layer_quantizers)
        if self.target is not None and self.n_codebooks > 1 and not self.layer_quantizers:
            raise ValueError(
                f"n_codebooks={self.n_codebooks!r}: a target allots one codebook to a weight; set "
                "n_codebooks=1, leave the target out, or say in layer_quantizers how each weight "
                'is stored ({"scheme": "additive", ...} has two)'
            )

    def _check_covers_stages(self, name: str, value: int | dict[str, int]) -> None:
        if not isinstance(value, dict) or not set(value) <= set(GROUPS):
            return  # a regex may cover anything
        for stage in self.stages:
            if stage in GROUPS and stage not in value:
                raise ValueError(
                    f"{name}={value!r} has no entry for the stage {stage!r}; "
                    f"add one, or take {stage!r} out of stages={self.stages!r}"
                )

    @property
    def weighs_errors(self) -> bool:
        return self.importance != "none"

    def noise_settings(self) -> dict[str, Any]:
        return {
            "noise": "proxy",
            "block_size": self._with_names("block_size"),
            "n_centroids": self._with_names("n_centroids"),
            **self._shared_with_noise(),
        }

    def _with_names(self, name: str) -> int | dict[str, int]:
        """A setting with what ``layer_quantizers`` gives single layers."""
        value = getattr(self, name)
        named = {
            re.escape(layer): entry[name]
            for layer, entry in self.layer_quantizers.items()
            if name in entry
        }
        if named and self.prune_layers is not None:
            raise ValueError(
                "layer_quantizers names layers as they are once prune_layers took some out, so "
                "noise on the whole model cannot match it; give QuantNoiseConfig a block_size"
            )
        return {**_for_all_groups(value), **named} if named else value

    @property
    def target(self) -> str | None:
        for name in ("target_size_mb", "target_bits_per_weight"):
            if (value := getattr(self, name)) is not None:
                return f"{name}={value!r}"
        return None

    def settings_by_name(self) -> dict[str, dict[str, Any]]:
        return self.layer_quantizers

    def quantizer_settings(self, layer) -> dict[str, Any] | None:
        for name in (layer.name, *layer.ties):
            if name in self.layer_quantizers:
                return self.layer_quantizers[name]
        block_size = block_size_of(self.block_size, layer)
        n_centroids = entry_for(self.n_centroids, layer)
        if block_size is None or n_centroids is None:
            return None
        return {
            "scheme": "pq" if self.n_codebooks == 1 else "additive",
            "block_size": block_size,
            "n_centroids": n_centroids,
            "codebook_bits": self.codebook_bits,
            "n_iter": self.kmeans_iter,
            "row_scale": self.row_scale,
        }

    def stage_groups(self) -> list[str | None]:
        return list(self.stages)


@SCHEMES.register("fixed_point")
@dataclass(repr=False)
class FixedPointConfig(QuantizedModelConfig):
    """Fixed-point scalar quantization of the weights (section 3.1, Eq. 2).

    Args:
        bits: N, 1 to 8; codes are packed to N bits each.
        observer: the range that the N bits are spread over: ``"minmax"`` (that of the weight),
            ``"channel"`` (one for each output feature, or row of a table), ``"histogram"`` (the one
            with the lowest squared error).
    """

    bits: int = 8
    observer: str = "minmax"

    scheme: ClassVar[str] = "fixed_point"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("bits", self.bits, 1, 8)
        check_choice("observer", self.observer, tuple(OBSERVERS))

    def noise_settings(self) -> dict[str, Any]:
        return {
            "noise": f"int{self.bits}",
            "observer": self.observer,
            **self._shared_with_noise(),
        }

    def quantizer_settings(self, layer) -> dict[str, Any] | None:
        return {"scheme": "int", "bits": self.bits, "observer": self.observer}

    def stage_groups(self) -> list[str | None]:
        return [None]
