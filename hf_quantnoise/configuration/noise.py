"""Configuration of the training noise (section 4)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from torch import nn

from ..argument_checks import require_instance, require_model
from ..registry import Registry
from ..structure import entry_for
from .checks import (
    boolean,
    fraction,
    integer,
    invalid,
    layer_chunks,
    one_of,
    patterns,
    sizes,
    word_or_steps,
)
from .entries import MAX_BLOCK_SIZE, MAX_CENTROIDS
from .hub_files import HubConfigMixin
from .layer_storage import noise_fields
from .options import Options, documented, from_file, option
from .row_groups import in_row_groups, rows_by_layer
from .storage import OBSERVERS, QuantizedModelConfig

NOISE_CONFIG_NAME = "quant_noise_config.json"

NOISES: Registry[Any] = Registry("noise", filled_by="noise")


def _noise_names(name: str, value: Any) -> None:
    names = value if isinstance(value, list | tuple) else [value]
    if not names:
        raise invalid(name, value, f"at least one of {', '.join(NOISES)}")
    for noise in names:
        if noise not in NOISES:
            raise ValueError(f"invalid {name}={value!r}: {NOISES.unknown(noise)}")


def _rates(name: str, value: Any) -> None:
    for rate in value if isinstance(value, list | tuple) else [value]:
        fraction(name, rate)


@documented
@dataclass
class QuantNoiseConfig(HubConfigMixin, Options):
    """Settings of quantization noise in training (section 4).

    Raises:
        ValueError: if a value is invalid; names the field, the value and what was expected.
    """

    noise: Annotated[str | list[str], _noise_names] = option(
        "proxy",
        "Noise function, or several applied in order (Eq. 8): 'proxy' sets the drawn blocks to "
        "zero, 'mean' to the mean block, 'pq' to their nearest centroid; 'int1' to 'int8' round to "
        "N bits (Eq. 2). In a list, put 'pq' first: its codes belong to the original weight.",
    )
    p: Annotated[float | list[float], _rates] = option(
        0.1,
        "Noise rate: fraction of the blocks that get noise in each forward pass, from 0 to 1 (1 is "
        "quantization-aware training). A list gives one rate per noise function.",
    )
    p_schedule: Annotated[str | int, word_or_steps("constant")] = option(
        "constant",
        "'constant', or the number of optimizer steps over which the rate rises linearly from 0. "
        "It needs the trainer or the callback.",
    )
    block_size: Annotated[int | dict[str, int], sizes(1, MAX_BLOCK_SIZE)] = option(
        8,
        "Number of weights per block, or a dict from structure group (ffn, attention, embeddings, "
        "head, conv) or regex for full layer names to it. Layers that match no key get no noise. "
        "Convolutions with kernels larger than 1x1 use the area of the kernel, or its width if the "
        "area is above 9 (section 7.8: 9 for 3x3, 5 for 5x5), unless a regex sets another size. "
        "intN noise works on single weights and ignores this.",
    )
    n_centroids: Annotated[int | dict[str, int], sizes(2, MAX_CENTROIDS)] = option(
        256,
        "Codebook size of 'pq', and number of clusters of block_selection 'cluster'; int or dict, "
        "like block_size.",
    )
    block_selection: Annotated[str, one_of(("all", "cluster"))] = option(
        "all",
        "'all' draws single blocks, 'cluster' draws clusters of similar blocks (table 5). intN "
        "noise draws single weights in both cases.",
    )
    codebook_update: Annotated[str | int | None, word_or_steps("epoch")] = option(
        None,
        "When codebooks and means are fitted again: every 'epoch', or every N steps. None: every "
        "epoch, or with learn_codebooks every step.",
    )
    learn_codebooks: Annotated[bool, boolean] = option(
        False,
        "Train the centroids of 'pq' with the model (section 3.2), instead of fitting them again; "
        "codebook_update then only assigns the blocks to their nearest centroids. With p=1 at the "
        "end, compress() stores exactly what was trained, except for leftovers (leftover_bits). "
        "In other trainers than QuantNoiseTrainer, add the centroids to the optimizer.",
    )
    codebook_bits: Annotated[int, one_of((32, 16, 8))] = option(
        16, "Bits per centroid value of 'pq', as in IPQConfig."
    )
    row_scale: Annotated[bool, boolean] = option(
        False, "A scale for each row of a weight in 'pq', as in IPQConfig."
    )
    n_codebooks: Annotated[int, one_of((1, 2))] = option(
        1, "Codebooks per weight of 'pq', as in IPQConfig."
    )
    frequent_rows: Annotated[int | float | dict[str, int] | None, rows_by_layer] = option(
        None,
        "Tables of token ids in two groups of rows with their own blocks and codebooks, as in "
        "IPQConfig; or a dict, like block_size, to the number of frequent rows.",
    )
    rare_block_size: Annotated[int | dict[str, int], sizes(1, MAX_BLOCK_SIZE)] = option(
        32, "Number of weights per block of rows that are not frequent; int or dict."
    )
    scale_update_steps: Annotated[int, integer(1)] = option(
        10, "Optimizer steps between updates of scale and zero point of intN noise."
    )
    batch_norm_batches: Annotated[int, integer(0)] = option(
        16,
        "Training batches per process on which the statistics of BatchNorm are measured for the "
        "weights without noise: before each evaluation and checkpoint, and after training. A batch "
        "takes about a third of a training step. 0: keep those of the noisy weights. It needs the "
        "trainer or the callback.",
    )
    observer: Annotated[str, one_of(OBSERVERS)] = option(
        "minmax",
        "Quantization range of intN noise: 'minmax' (of the weight), 'channel' (one range per "
        "output feature or table row), 'histogram' (running extremes, and the range between them "
        "with the lowest squared error; section 7.7, table 10).",
    )
    layerdrop: Annotated[float, fraction] = option(
        0.0,
        "Probability of skipping each layer of a stack in training (LayerDrop; sections 4.2 and "
        "7.6). Layers that share weights are skipped together.",
    )
    layerdrop_ste: Annotated[bool, boolean] = option(
        False, "Compute gradients as if no layer was skipped (table 11)."
    )
    activation_bits: Annotated[int | None, integer(1, 8)] = option(
        None,
        "Bits, 1 to 8, that the inputs of layers with noise are rounded to in training (section "
        "7.7). None: no rounding.",
    )
    activation_calibration: Annotated[int, integer(1)] = option(
        16, "With activation_bits, initial forward passes that only set the range of inputs."
    )
    share_layers: Annotated[int | list[list[str]], layer_chunks] = option(
        1,
        "Number of adjacent layers of a stack that share the weights of the first of them (section "
        "7.9); or, for models without stacks, a list of chunks, each a list of layer names. 1: no "
        "sharing. Checkpoints hold every layer.",
    )
    target_modules: Annotated[str | list[str] | None, patterns] = option(
        None,
        "Layers that get noise: a regex for full names, or a list of names and suffixes, as in "
        "PEFT. None: all layers except squeeze-and-excitation blocks (section 7.8); 'proxy' noise "
        "skips position and type embeddings, too (it could set all inputs of a LayerNorm to zero).",
    )
    exclude_modules: Annotated[str | list[str] | None, patterns] = option(
        None, "Layers that get no noise; same form as target_modules."
    )
    seed: Annotated[int, integer(0, 2**63 - 1)] = option(
        0, "Seed of the k-means of 'pq'. Masks follow torch's global seed."
    )

    file_name: ClassVar[str] = NOISE_CONFIG_NAME

    def __post_init__(self) -> None:
        super().__post_init__()
        names, rates = self._names_and_rates()
        if len(rates) != len(names):
            raise ValueError(
                f"invalid p={self.p!r}: {len(rates)} rates for {len(names)} noises {names!r}; pass "
                "one rate for all, or one for each"
            )
        on_blocks = any(NOISES[name].reads_block_size for name in names)
        if self.block_selection == "cluster" and not on_blocks:
            raise ValueError(
                f"invalid block_selection='cluster' with noise={self.noise!r}, which works on "
                "single weights; set block_selection='all'"
            )
        if self.learn_codebooks and "pq" not in names:
            raise ValueError(
                f"invalid learn_codebooks=True with noise={self.noise!r}, which has no centroids; "
                "add 'pq', or set learn_codebooks=False"
            )
        if self.block_selection == "cluster" and self.n_codebooks > 1 and "pq" in names:
            raise ValueError(
                f"invalid block_selection='cluster' with n_codebooks={self.n_codebooks}: a block "
                "belongs to one cluster; set n_codebooks=1, or block_selection='all'"
            )
        if self.frequent_rows is not None and (
            self.block_selection == "cluster" or "mean" in names
        ):
            raise ValueError(
                f"invalid frequent_rows={self.frequent_rows!r} with noise={self.noise!r} and "
                f"block_selection={self.block_selection!r}: a mean block, and clusters, have one "
                "block size; use 'pq' or 'proxy' and block_selection='all', or frequent_rows=None"
            )

    def _names_and_rates(self) -> tuple[list[str], list[float]]:
        names = list(self.noise) if isinstance(self.noise, list | tuple) else [self.noise]
        rates = list(self.p) if isinstance(self.p, list | tuple) else [self.p] * len(names)
        return names, [float(rate) for rate in rates]

    def pq_settings(self, block_size: int, n_centroids: int) -> dict[str, Any]:
        """Return the quantizer settings of 'pq' noise, for a block size and codebook size."""
        return {
            "scheme": "pq" if self.n_codebooks == 1 else "additive",
            "block_size": block_size,
            "n_centroids": n_centroids,
            "codebook_bits": self.codebook_bits,
            "row_scale": self.row_scale,
        }

    def in_row_groups(self, settings: dict[str, Any], layer: Any) -> dict[str, Any]:
        """Return the quantizer settings of a layer's noise, in groups of rows if it has them."""
        groups: tuple[Any, Any] = (self.frequent_rows, self.rare_block_size)
        return in_row_groups(settings, layer, *(entry_for(value, layer) for value in groups))

    @property
    def counts_lookups(self) -> str | None:
        """Name of the field that needs the number of lookups of each row of a table, or None."""
        return None if self.frequent_rows is None else "frequent_rows"

    @property
    def noises(self) -> list[tuple[str, float]]:
        """(name, rate) of each noise function, in the order of application."""
        return list(zip(*self._names_and_rates(), strict=True))

    @property
    def trains_latent_weights(self) -> bool:
        """Whether a rate is 1: training then never uses the weights as they are."""
        return any(rate == 1 for _, rate in self.noises)

    @property
    def codebook_interval(self) -> str | int:
        """``codebook_update``, or the interval for None."""
        if self.codebook_update is None:
            return 1 if self.learn_codebooks else "epoch"
        return self.codebook_update

    def p_at(self, step: int) -> list[float]:
        """Return the rate of each noise at an optimizer step, counted from 0."""
        scale = 1.0
        if self.p_schedule != "constant":
            scale = min(1.0, (step + 1) / int(self.p_schedule))
        return [scale * rate for _, rate in self.noises]

    @classmethod
    def matching(
        cls,
        quantization_config: QuantizedModelConfig,
        model: nn.Module | None = None,
        **overrides: Any,
    ) -> QuantNoiseConfig:
        """Return noise that has the block sizes with which the model will be quantized.

        The noise is ``"proxy"`` for an :class:`IPQConfig`, ``"intN"`` for a
        :class:`FixedPointConfig`. ``overrides`` are fields of this class. With a model, only layers
        that will be quantized get noise, and of these only those that ``target_modules`` and
        ``exclude_modules`` in the overrides select: the others are in ``exclude_modules``.

        Raises:
            ValueError: if the config has a target size and no ``layer_quantizers`` yet, or does
                not fit the model.
        """
        require_instance(
            "quantization_config", quantization_config, QuantizedModelConfig,
            "an IPQConfig or a FixedPointConfig", "pass the config of the compressed model",
        )  # fmt: skip
        if model is not None:
            require_model(model, nn.Module)
        settings = quantization_config.noise_settings(model)
        return cls(**noise_fields(model, settings, overrides))

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as a JSON-able dict."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantNoiseConfig:
        """Return the config of :meth:`to_dict`; unknown fields raise a ``ValueError``."""
        config: QuantNoiseConfig = from_file(cls, values)
        if "learn_codebooks" not in values:  # of a release that had float32 centroids
            config.codebook_bits = values.get("codebook_bits", 32)
        return config

    def to_json_string(self) -> str:
        """Return indented JSON with sorted keys."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
