"""Configuration of iterative product quantization (section 3.2)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from torch import nn

from ..structure import GROUPS, block_size_of, entry_for
from .checks import boolean, integer, invalid, one_of, positive, regex, rows_or_share, sizes
from .entries import MAX_BLOCK_SIZE, MAX_CENTROIDS
from .layer_quantizers import checked_layer_quantizers, with_codebook_bits
from .layer_storage import stored_layers
from .options import documented, option
from .row_groups import in_row_groups, of_two_groups
from .storage import SCHEMES, QuantizedModelConfig

# Stages in their order if a config names none; see IPQConfig.stage_groups.
DEFAULT_STAGES = ("ffn", "embeddings", "attention", "conv", "head")

# Fields that noise has, too, by layer if layer_quantizers is set.
_BLOCKS = ("block_size", "n_centroids", "frequent_rows", "rare_block_size")


def _stages(name: str, value: Any) -> None:
    if not isinstance(value, list | tuple) or not value:
        raise invalid(name, value, f"a list of structure groups ({', '.join(GROUPS)}) or regexes")
    for stage in value:
        regex(name, stage)
    if len(set(value)) != len(value):
        raise ValueError(f"invalid {name}={value!r}: a stage is listed twice; remove one")


@SCHEMES.register("ipq")
@documented
@dataclass(repr=False)
class IPQConfig(QuantizedModelConfig):
    """Settings of iterative product quantization (section 3.2)."""

    block_size: Annotated[int | dict[str, int], sizes(1, MAX_BLOCK_SIZE)] = option(
        4,
        "Number of weights per block, or a dict from structure group (ffn, attention, embeddings, "
        "head, conv) or regex for full layer names to it. Section 7.8 has 4 for RoBERTa, and 8 "
        "(ffn), 8 (embeddings), 4 (attention) for language models.",
    )
    n_centroids: Annotated[int | dict[str, int], sizes(2, MAX_CENTROIDS)] = option(
        256,
        "Centroids per codebook, 2 to 65,536; codes take ceil(log2 n_centroids) bits. Int or dict, "
        "like block_size.",
    )
    stages: Annotated[list[str] | tuple[str, ...] | None, _stages] = option(
        None,
        "Structure groups, or regexes for full layer names, in the order of quantization. Layers "
        "of no stage are stored according to leftover_bits. None: those of ffn, embeddings, "
        "attention and conv that the model has; and head, in models with convolutions (section "
        "7.8).",
    )
    codebook_bits: Annotated[int, one_of((32, 16, 8))] = option(
        16,
        "Bits per stored centroid value: 32, 16, or 8 (Eq. 2 on the codebook; section 3.3). "
        "For weights that float16 cannot hold, 32 is used instead of 16.",
    )
    kmeans_iter: Annotated[int, integer(1, 100_000)] = option(
        20, "Maximum number of k-means iterations."
    )
    importance: Annotated[Literal["none", "activations"], one_of(("none", "activations"))] = option(
        "none",
        "'activations' weights the squared error of each weight, in k-means and in the choice of "
        "codes, by the squared inputs it is multiplied with on calibration data (diagonal of X^T "
        "X; for a table, how often each row is looked up).",
    )
    row_scale: Annotated[bool, boolean] = option(
        False,
        "Store a float16 scale for each row of a weight (output feature, word), fitted together "
        "with the codebook and trained with it, so that rows of different norms share centroids.",
    )
    n_codebooks: Annotated[int, one_of((1, 2))] = option(
        1,
        "With 2, a block is the sum of one centroid from each of two codebooks, found by beam "
        "search and stored as two codes. Blocks of 8 then take as many bits as blocks of 4 with 1.",
    )
    frequent_rows: Annotated[int | float | None, rows_or_share] = option(
        None,
        "Store tables of token ids in two groups of rows: this number of the most frequent rows in "
        "the training data in blocks of block_size, the others in blocks of rare_block_size. A "
        "fraction (0.96) is the share of the lookups that frequent rows serve. None: one group.",
    )
    rare_block_size: Annotated[int, integer(1, MAX_BLOCK_SIZE)] = option(
        32, "Number of weights per block of the rows that are not frequent; see frequent_rows."
    )
    target_size_mb: Annotated[float | None, positive] = option(
        None,
        "Maximum size of model.safetensors in MB (10^6 bytes). Block size, number of centroids or "
        "intN are then allocated to each weight, and block_size and n_centroids are ignored.",
    )
    target_bits_per_weight: Annotated[float | None, positive] = option(
        None,
        "Like target_size_mb, in bits per parameter (counted after sharing and pruning). Set only "
        "one of the two.",
    )
    layer_quantizers: dict[str, dict[str, Any]] = option(
        {},
        "Layer name -> how it is stored, which overrides the fields above: {'scheme': 'pq', "
        "'block_size': 8, 'n_centroids': 256}, {'scheme': 'int', 'bits': 4}, {'scheme': 'dense'}, "
        "or an entry of a plan. Without 'codebook_bits', that of the config applies. A target size "
        "sets it, unless it is already set.",
    )

    scheme: ClassVar[str] = "ipq"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages is not None:
            self.stages = list(self.stages)
            self.check_covers(self.stages)
        if self.target_size_mb is not None and self.target_bits_per_weight is not None:
            raise ValueError(
                f"target_size_mb={self.target_size_mb!r} and target_bits_per_weight="
                f"{self.target_bits_per_weight!r} are both set; pass only one of them"
            )
        self.layer_quantizers = checked_layer_quantizers("layer_quantizers", self.layer_quantizers)
        if self.target is not None and self.n_codebooks > 1 and not self.layer_quantizers:
            raise ValueError(
                f"invalid n_codebooks={self.n_codebooks!r} with {self.target}: bit allocation uses "
                "one codebook per weight; set n_codebooks=1, remove the target, or set "
                'layer_quantizers ({"scheme": "additive", ...} has two codebooks)'
            )

    def restore_old_defaults(self) -> None:
        super().restore_old_defaults()
        self.layer_quantizers = {
            layer: with_codebook_bits(entry, 32) for layer, entry in self.layer_quantizers.items()
        }

    def check_covers(self, stages: Sequence[str]) -> None:
        """Raise if ``block_size`` or ``n_centroids`` is a dict without an entry for a stage."""
        for name in ("block_size", "n_centroids"):
            value = getattr(self, name)
            if not isinstance(value, dict) or not set(value) <= set(GROUPS):
                continue  # a regex may match any layer
            for stage in stages:
                if stage in GROUPS and stage not in value:
                    raise ValueError(
                        f"invalid {name}={value!r}: no entry for the stage {stage!r}; add one, or "
                        f"remove {stage!r} from stages={list(stages)!r}"
                    )

    @property
    def weighs_errors(self) -> bool:
        return self.importance != "none"

    @property
    def counts_lookups(self) -> str | None:
        if self.frequent_rows is not None:
            return "frequent_rows"
        by_name = self.layer_quantizers.values()
        in_groups = any(settings["scheme"] == "row_groups" for settings in by_name)
        return "layer_quantizers" if in_groups else None

    def noise_settings(self, model: nn.Module | None = None) -> dict[str, Any]:
        if self.target is not None and not self.layer_quantizers:
            raise ValueError(
                f"cannot match {self.target}, which decides on block sizes when bits are "
                "allocated; pass allocate_bits(model, config, batches)"
            )
        if self.prune_layers is not None and self.layer_quantizers:
            raise ValueError(
                f"cannot match layer_quantizers with prune_layers={self.prune_layers!r}: it names "
                "the layers after pruning, and noise is on the full model; write a "
                "QuantNoiseConfig with your block_size"
            )
        return {
            "noise": "proxy",
            **(self._by_layer(model) if self.layer_quantizers else self._values(_BLOCKS)),
            **self._values(("codebook_bits", "row_scale", "n_codebooks")),
            **super().noise_settings(model),
        }

    def noise_is_like(self, quantizer: Any) -> bool:
        return quantizer.scheme != "int"  # which layer_quantizers may contain

    def _values(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    def _by_layer(self, model: nn.Module | None) -> dict[str, Any]:
        """Return block sizes, codebook sizes and groups of rows of single layers: regex -> value.

        Without a model, the values of all structure groups come first.
        """
        if (field := self.counts_lookups) and (
            model is None or isinstance(self.frequent_rows, float)
        ):
            raise ValueError(
                f"cannot match {field}={getattr(self, field)!r} together with layer_quantizers "
                "without a model, or as a share of the lookups; use "
                "QuantNoiseConfig.matching(config, model) and a number (frequent_rows=8000)"
            )
        if model is None:
            settings, groups = self.layer_quantizers, self._values(("block_size", "n_centroids"))
        else:
            packed, _ = stored_layers(self, model)
            settings, groups = {name: own.to_dict() for name, own in packed.items()}, {}
        stored = {re.escape(name): of_two_groups(name, own) for name, own in settings.items()}
        fields = {}
        for name in _BLOCKS:
            own = groups.get(name, {})
            values = own if isinstance(own, dict) else dict.fromkeys(GROUPS, own)
            values = values | {
                regex: entry[name] for regex, entry in stored.items() if name in entry
            }
            if values:
                fields[name] = values
        return fields

    @property
    def target(self) -> str | None:
        if self.target_size_mb is not None:
            return f"target_size_mb={self.target_size_mb!r}"
        bits = self.target_bits_per_weight
        return None if bits is None else f"target_bits_per_weight={bits!r}"

    def settings_by_name(self) -> dict[str, dict[str, Any]]:
        return self.layer_quantizers

    def quantizer_settings(self, layer: Any) -> dict[str, Any] | None:
        for name in (layer.name, *layer.ties):
            if name in self.layer_quantizers:
                return with_codebook_bits(self.layer_quantizers[name], self.codebook_bits)
        block_size = block_size_of(self.block_size, layer)
        n_centroids = entry_for(self.n_centroids, layer)
        if block_size is None or n_centroids is None:
            return None
        settings = {
            "scheme": "pq" if self.n_codebooks == 1 else "additive",
            "block_size": block_size,
            "n_centroids": n_centroids,
            "codebook_bits": self.codebook_bits,
            "n_iter": self.kmeans_iter,
            "row_scale": self.row_scale,
        }
        return in_row_groups(settings, layer, self.frequent_rows, self.rare_block_size)

    @property
    def has_default_stages(self) -> bool:
        return self.stages is None

    def stage_groups(self, groups: Collection[str] = GROUPS) -> list[str | None]:
        if self.stages is not None:
            return list(self.stages)
        return [
            stage
            for stage in DEFAULT_STAGES
            if stage in groups and (stage != "head" or "conv" in groups)
        ]
