"""The configs: what noise to train with, and how a compressed model is stored.

All are plain dataclasses with strict validation and a JSON form. The two quantization configs are
also what ``config.json`` holds as ``quantization_config`` after compression (the plan included).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from transformers.utils.quantization_config import QuantizationConfigMixin

from .registry import Registry
from .structure import GROUPS, block_size_of, entry_for
from .validation import (
    check_choice,
    check_int,
    check_patterns,
    check_per_layer,
    check_rate,
    check_regex,
    check_word_or_steps,
    is_int,
    reject_unknown,
)

QUANT_METHOD = "hf_quantnoise"
FORMAT_VERSION = 1
# For whoever opens a config.json and wonders; it is written and never read.
LOAD_HINT = "import hf_quantnoise before loading; pip install hf-quantnoise"
MAX_BLOCK_SIZE = 65_536
NOISE_CONFIG_NAME = "quant_noise_config.json"

NOISES: Registry[type] = Registry("noise")
SCHEMES: Registry[type] = Registry("scheme")
OBSERVERS: Registry = Registry("observer")


# ---- noise ---------------------------------------------------------------------------------------


@dataclass
class QuantNoiseConfig:
    """Which noise to train with (section 4).

    Args:
        noise: name of the noise function, or a list of names composed in order (Eq. 8):
            ``"proxy"`` (selected blocks are zeroed), ``"mean"`` (replaced by the mean block),
            ``"pq"`` (by their nearest centroid), ``"intN"`` (rounded to N bits, Eq. 2).
        p: share of the blocks noised in each forward, 0 <= p <= 1; a list beside a list of noises.
        p_schedule: ``"constant"``, or a number of optimizer steps over which the rates rise from 0
            to ``p`` in a straight line. The callback carries it out.
        block_size: numbers per block, or a dict from structure group (``"ffn"``, ``"attention"``,
            ``"embeddings"``, ``"head"``) or regex for layer names to it. A layer that no key of the
            dict covers gets no noise. intN noise works on single weights and does not read it.
        n_centroids: size of the codebooks of ``"pq"``; an int or a dict like ``block_size``.
        block_selection: ``"all"`` draws single blocks, ``"cluster"`` whole clusters, each with
            probability p (table 5). intN noise draws single weights either way.
        codebook_update: refresh the codebooks of ``"pq"`` every ``"epoch"``, or every n steps.
        observer: the range of ``"intN"``: ``"minmax"`` (that of the weight), ``"channel"`` (one for
            each output feature, or row of a table), ``"histogram"`` (running minimum and maximum,
            and the range between them with the lowest squared error: section 7.7, table 10).
        scale_update_steps: refresh scale and zero point of ``"intN"`` every so many steps.
        layerdrop: rate at which each layer of a stack is skipped in training (LayerDrop, 4.2).
        layerdrop_ste: let gradients flow as if no layer was skipped (table 11).
        activation_bits: bits, 1 to 8, that what enters a noised layer is rounded to in training, or
            None. Its range is that of the first ``activation_calibration`` forwards, then fixed.
        activation_calibration: forwards that set that range, rounding nothing.
        target_modules: regex for whole layer names, or a list of exact names and suffixes. None
            takes every layer except position and type embeddings, whose zeroed rows can make an
            all-zero vector before a LayerNorm.
        exclude_modules: layers to leave clean; same form.
        seed: seed of the k-means behind ``"pq"`` (masks follow torch's global seed).

    Raises:
        ValueError: naming the field, the value given and what would do.
    """

    noise: str | list[str] = field(default="proxy", metadata={"help": "Noise, or noises in order."})
    p: float | list[float] = field(default=0.1, metadata={"help": "Share of noised blocks."})
    p_schedule: str | int = field(
        default="constant", metadata={"help": "'constant', or steps of linear warm-up."}
    )
    block_size: int | dict[str, int] = field(default=8, metadata={"help": "Numbers per block."})
    n_centroids: int | dict[str, int] = field(
        default=256, metadata={"help": "Size of the codebooks of 'pq'."}
    )
    block_selection: str = field(
        default="all", metadata={"help": "'all' or 'cluster': what is drawn (table 5)."}
    )
    codebook_update: str | int = field(default="epoch", metadata={"help": "'epoch' or steps."})
    scale_update_steps: int = field(default=10, metadata={"help": "Steps between intN refreshes."})
    observer: str = field(default="minmax", metadata={"help": "Range of 'intN' noise."})
    layerdrop: float = field(default=0.0, metadata={"help": "Rate of skipped layers."})
    layerdrop_ste: bool = field(
        default=False, metadata={"help": "Gradients as if no layer was skipped (table 11)."}
    )
    activation_bits: int | None = field(default=None, metadata={"help": "Bits of activations."})
    activation_calibration: int = field(
        default=16, metadata={"help": "Forwards that set the range of activations."}
    )
    target_modules: str | list[str] | None = field(default=None, metadata={"help": "Which layers."})
    exclude_modules: str | list[str] | None = field(default=None, metadata={"help": "But not."})
    seed: int = field(default=0, metadata={"help": "Seed of the k-means behind 'pq'."})

    def __post_init__(self) -> None:
        names = self.noise if isinstance(self.noise, (list, tuple)) else [self.noise]
        if not names:
            raise ValueError(f"noise={self.noise!r} is empty; known: {', '.join(NOISES)}")
        for name in names:
            if name not in NOISES:
                raise ValueError(f"noise: {NOISES.unknown(name)}")
        rates = self.p if isinstance(self.p, (list, tuple)) else [self.p] * len(names)
        for rate in rates:
            check_rate("p", rate)
        if len(rates) != len(names):
            raise ValueError(
                f"p={self.p!r} has {len(rates)} rates for {len(names)} noises {names!r}; "
                "give one rate for all or one for each"
            )
        check_per_layer("block_size", self.block_size, 1, MAX_BLOCK_SIZE)
        check_per_layer("n_centroids", self.n_centroids, 2, 65536)
        check_choice("block_selection", self.block_selection, ("all", "cluster"))
        if self.block_selection == "cluster" and not any(
            NOISES[name].reads_block_size for name in names
        ):
            raise ValueError(
                f"block_selection='cluster' needs a noise on blocks; noise={self.noise!r} works on "
                "single weights: take block_selection='all'"
            )
        check_word_or_steps("p_schedule", self.p_schedule, "constant")
        check_word_or_steps("codebook_update", self.codebook_update, "epoch")
        check_choice("observer", self.observer, tuple(OBSERVERS))
        check_rate("layerdrop", self.layerdrop)
        if self.activation_bits is not None:
            check_int("activation_bits", self.activation_bits, 1, 8)
        check_int("activation_calibration", self.activation_calibration, 1, 2**31)
        check_int("scale_update_steps", self.scale_update_steps, 1, 2**31)
        check_int("seed", self.seed, 0, 2**63 - 1)
        check_patterns("target_modules", self.target_modules)
        check_patterns("exclude_modules", self.exclude_modules)

    @property
    def noises(self) -> list[tuple[str, float]]:
        """(name, rate) of each noise, in the order in which they are composed."""
        names = list(self.noise) if isinstance(self.noise, (list, tuple)) else [self.noise]
        rates = list(self.p) if isinstance(self.p, (list, tuple)) else [self.p] * len(names)
        return list(zip(names, map(float, rates), strict=True))

    def p_at(self, step: int) -> list[float]:
        """The rate of each noise at an optimizer step (0 is the first), by ``p_schedule``."""
        share = 1.0
        if self.p_schedule != "constant":
            share = min(1.0, (step + 1) / self.p_schedule)
        return [share * rate for _, rate in self.noises]

    @classmethod
    def matching(cls, quantization_config: QuantizedModelConfig, **overrides) -> QuantNoiseConfig:
        """Noise with the very blocks of a target: the proxy on the blocks of an :class:`IPQConfig`,
        ``intN`` for a :class:`FixedPointConfig`. ``overrides`` are fields of this class."""
        return cls(**{**quantization_config.noise_settings(), **overrides})

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict of all fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantNoiseConfig:
        """The inverse of :meth:`to_dict`; unknown fields are refused."""
        reject_unknown(cls, values)
        return cls(**values)

    def to_json_string(self) -> str:
        """Indented JSON with sorted keys."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes ``quant_noise_config.json`` into a folder, which is made where it is missing."""
        os.makedirs(save_directory, exist_ok=True)
        with open(os.path.join(save_directory, NOISE_CONFIG_NAME), "w", encoding="utf-8") as file:
            file.write(self.to_json_string())

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> QuantNoiseConfig:
        """Reads the config of a folder (or the JSON file itself).

        Raises:
            FileNotFoundError: naming the file that is not there.
        """
        path = os.fspath(path)
        file_name = os.path.join(path, NOISE_CONFIG_NAME) if os.path.isdir(path) else path
        if not os.path.isfile(file_name):
            raise FileNotFoundError(
                f"{file_name} is missing; QuantNoiseConfig.save_pretrained(folder) writes it"
            )
        with open(file_name, encoding="utf-8") as file:
            return cls.from_dict(json.load(file))


# ---- storage -------------------------------------------------------------------------------------


@dataclass(repr=False)
class QuantizedModelConfig(QuantizationConfigMixin):
    """What every quantized model's ``quantization_config`` holds, whatever its scheme.

    Args:
        target_modules: which layers to quantize (regex, or list of exact names and suffixes).
        exclude_modules: which of them to leave dense.
        activation_bits: bits, 1 to 8, that what enters a quantized layer is rounded to (7.7), with
            a scale found on calibration data; None leaves activations in floating point.
        seed: seed of the codebooks.
        plan: after compression, layer name -> how it is stored. Filled by the package.
        left_dense: after compression, name of a layer or bare parameter -> why it is stored in
            floating point.
        format_version: version of the layout on disk.
    """

    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    activation_bits: int | None = None
    seed: int = 0
    plan: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_dense: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    scheme: ClassVar[str] = ""
    quant_method: ClassVar[str] = QUANT_METHOD

    def __post_init__(self) -> None:
        if not is_int(self.format_version) or self.format_version < 1:
            raise ValueError(f"format_version={self.format_version!r} must be a positive integer")
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"format_version={self.format_version} was written by a newer hf_quantnoise; this "
                f"one reads up to {FORMAT_VERSION}. Install it with: pip install -U hf-quantnoise"
            )
        if self.activation_bits is not None:
            check_int("activation_bits", self.activation_bits, 1, 8)
        check_int("seed", self.seed, 0, 2**63 - 1)
        check_patterns("target_modules", self.target_modules)
        check_patterns("exclude_modules", self.exclude_modules)

    @property
    def is_compressed(self) -> bool:
        """Whether the config describes a finished model (it holds a plan)."""
        return bool(self.plan)

    def noise_settings(self) -> dict[str, Any]:
        """The fields of the :class:`QuantNoiseConfig` with this target's blocks."""
        raise NotImplementedError

    def _shared_with_noise(self) -> dict[str, Any]:
        names = ("activation_bits", "target_modules", "exclude_modules", "seed")
        return {name: getattr(self, name) for name in names}

    def quantizer_settings(self, layer) -> dict[str, Any] | None:
        """Settings of the quantizer for a layer, or None where this config does not cover it."""
        raise NotImplementedError

    def stage_groups(self) -> list[str | None]:
        """The stages in order: a structure group or regex each; None takes all layers."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict: all fields, the quantization method and the scheme."""
        head = {"quant_method": QUANT_METHOD, "scheme": self.scheme, "how_to_load": LOAD_HINT}
        return {**head, **asdict(self)}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs=False, **kwargs):
        """The inverse of :meth:`to_dict`, for any scheme; unknown fields are refused."""
        head = ("quant_method", "scheme", "how_to_load")
        values = {key: value for key, value in config_dict.items() if key not in head}
        target = SCHEMES[config_dict.get("scheme", cls.scheme)]
        # A newer format may bring fields of its own: say that it is newer, not that they are odd.
        cls(format_version=values.get("format_version", FORMAT_VERSION))
        reject_unknown(target, values)
        config = target(**values)
        return (config, kwargs) if return_unused_kwargs else config


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
    """

    block_size: int | dict[str, int] = 4
    n_centroids: int | dict[str, int] = 256
    stages: list[str] | tuple[str, ...] = ("ffn", "embeddings", "attention")
    codebook_bits: int = 32
    kmeans_iter: int = 20

    scheme: ClassVar[str] = "ipq"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_per_layer("block_size", self.block_size, 1, MAX_BLOCK_SIZE)
        check_per_layer("n_centroids", self.n_centroids, 2, 65536)
        check_choice("codebook_bits", self.codebook_bits, (32, 16, 8))
        check_int("kmeans_iter", self.kmeans_iter, 1, 100_000)
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

    def _check_covers_stages(self, name: str, value: int | dict[str, int]) -> None:
        if not isinstance(value, dict) or not set(value) <= set(GROUPS):
            return  # a regex may cover anything
        for stage in self.stages:
            if stage in GROUPS and stage not in value:
                raise ValueError(
                    f"{name}={value!r} has no entry for the stage {stage!r}; "
                    f"add one, or take {stage!r} out of stages={self.stages!r}"
                )

    def noise_settings(self) -> dict[str, Any]:
        return {
            "noise": "proxy",
            "block_size": self.block_size,
            "n_centroids": self.n_centroids,
            **self._shared_with_noise(),
        }

    def quantizer_settings(self, layer) -> dict[str, Any] | None:
        block_size = block_size_of(self.block_size, layer)
        n_centroids = entry_for(self.n_centroids, layer)
        if block_size is None or n_centroids is None:
            return None
        return {
            "scheme": "pq",
            "block_size": block_size,
            "n_centroids": n_centroids,
            "codebook_bits": self.codebook_bits,
            "n_iter": self.kmeans_iter,
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
