"""What noise to train with (section 4)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from ..registry import Registry
from ..validation import (
    check_choice,
    check_int,
    check_patterns,
    check_per_layer,
    check_rate,
    check_share_layers,
    check_word_or_steps,
    reject_unknown,
)
from .hub_files import HubConfigMixin
from .storage import MAX_BLOCK_SIZE, OBSERVERS, QuantizedModelConfig

NOISE_CONFIG_NAME = "quant_noise_config.json"

NOISES: Registry[type] = Registry("noise")


@dataclass
class QuantNoiseConfig(HubConfigMixin):
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
        layerdrop: rate at which each layer of a stack is skipped in training (LayerDrop, 4.2);
            the layers of a chunk that ``share_layers`` makes are skipped together (7.6).
        layerdrop_ste: let gradients flow as if no layer was skipped (table 11).
        activation_bits: bits, 1 to 8, that what enters a noised layer is rounded to in training, or
            None. Its range is that of the first ``activation_calibration`` forwards, then fixed.
        activation_calibration: forwards that set that range, rounding nothing.
        share_layers: adjacent layers of a stack share their weights in chunks of n (7.9), beginning
            with those of the first; or a list of chunks, each a list of layer names. 1: no sharing.
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
    share_layers: int | list[list[str]] = field(
        default=1, metadata={"help": "Layers per chunk of shared weights, or the chunks by name."}
    )
    target_modules: str | list[str] | None = field(default=None, metadata={"help": "Which layers."})
    exclude_modules: str | list[str] | None = field(default=None, metadata={"help": "But not."})
    seed: int = field(default=0, metadata={"help": "Seed of the k-means behind 'pq'."})

    file_name: ClassVar[str] = NOISE_CONFIG_NAME

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
        check_share_layers("share_layers", self.share_layers)
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
