"""Recipes: settings for a size, to be used as they are or as a starting point.

A recipe finetunes without noise, then trains all layers with exact PQ noise of rate 1 whose
centroids are trained and whose codes follow the weights, with the finetuned model as teacher
(sections 4 and 5.3), and stores the result as it was trained. With training batches, bits are
allocated to the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedModel

from .argument_checks import require_instance
from .compression import CompressionArguments, allocate_bits, file_bytes, smallest_bytes
from .configuration import IPQConfig, QuantNoiseConfig
from .configuration.checks import invalid
from .configuration.options import Options, changed_options
from .lookups import Lookups
from .model_families import (
    ENCODER,
    FAMILIES,
    IMAGE_MODEL,
    LANGUAGE_MODEL,
    family_of,
    reference_model,
)
from .modeling.packable import check_can_be_packed
from .structure import find_layers

# Blocks of a family, larger files first. The first entry that reaches a size is used: small tables
# and leftovers make a difference between models. A group that is not listed is a leftover (pooler
# and classifier of an encoder). "rare" is the block size of the rows of a table of token ids but
# the most frequent ones, one in FREQUENT_ROWS; it was measured for encoders.
_BLOCKS: dict[str, tuple[dict[str, int], ...]] = {
    ENCODER: (
        {"ffn": 4, "attention": 4, "embeddings": 4},
        {"ffn": 4, "attention": 4, "embeddings": 4, "rare": 16},
        {"ffn": 8, "attention": 4, "embeddings": 4, "rare": 16},
        {"ffn": 8, "attention": 8, "embeddings": 4, "rare": 32},
        {"ffn": 8, "attention": 8, "embeddings": 8, "rare": 32},
        {"ffn": 16, "attention": 8, "embeddings": 8, "rare": 32},
        {"ffn": 16, "attention": 16, "embeddings": 16, "rare": 32},
    ),
    LANGUAGE_MODEL: tuple(
        {"ffn": ffn, "attention": attention, "embeddings": table, "head": table}
        for ffn, attention, table in (
            (4, 4, 4), (4, 4, 8), (8, 4, 8), (8, 8, 8), (8, 8, 16), (16, 8, 16), (16, 16, 16)
        )
    ),
    # "conv" is that of 1x1 kernels; larger ones are one block, or one per row (section 7.8).
    IMAGE_MODEL: tuple({"conv": size, "head": size, "ffn": size} for size in (4, 8, 16)),
}  # fmt: skip
FREQUENT_ROWS = 4
# Fewer, if codebooks take most of the bytes of a small model.
_N_CENTROIDS = (256, 64, 16)


@dataclass(frozen=True)
class Training:
    """Training with noise; its length in multiples of the finetuning."""

    length: float
    codebook_learning_rate: float = 5e-4


TRAINING = {"13x": Training(1.0), "20x": Training(2.0), "30x": Training(3.0)}
# At the low rates of encoders, codes that are assigned every step cost time and gain nothing.
_CODEBOOK_UPDATE = {ENCODER: 20}
# Training batches for bit allocation, which takes two forward passes of each for every weight.
BUDGET_BATCHES = 4
# Families for which bit allocation was measured.
ALLOCATED = (ENCODER, LANGUAGE_MODEL)


@dataclass
class Recipe:
    """Settings for a size. All can be changed; ``print`` shows them.

    Attributes:
        size: ``"13x"``, ``"20x"`` or ``"30x"``.
        family: one of ``FAMILIES``.
        times_smaller: size of the model of :func:`recipe` in float32, divided by that of the
            compressed file.
        quantization: for ``QuantNoiseTrainer.compress``.
        noise: for ``QuantNoiseTrainer``, with the blocks of ``quantization``. Change both together:
            ``QuantNoiseConfig.matching(quantization, model, ...)``.
        compression: for ``QuantNoiseTrainer``, as ``compression_args``.
        length: length of the training with noise, in multiples of the finetuning. Use the learning
            rate of the finetuning.

    Example:
        >>> settings = recipe("30x", model)
        >>> args = TrainingArguments("out", learning_rate=rate_of_finetuning,
        ...                          num_train_epochs=settings.length * epochs_of_finetuning)
        >>> trainer = QuantNoiseTrainer(
        ...     model, args, settings.noise, teacher=copy.deepcopy(model),
        ...     compression_args=settings.compression, train_dataset=data,
        ... )
        >>> trainer.train()
        >>> small = trainer.compress(settings.quantization)
    """

    size: str
    family: str
    times_smaller: float
    quantization: IPQConfig
    noise: QuantNoiseConfig
    compression: CompressionArguments
    length: float

    def __repr__(self) -> str:
        lines = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Options):
                given = ", ".join(f"{k}={v!r}" for k, v in changed_options(value).items())
                text = f"{type(value).__name__}({given})"
            else:
                text = f"{value:.1f}" if field.name == "times_smaller" else repr(value)
            lines.append(f"    {field.name}={text},")
        return "\n".join(["Recipe(", *lines, ")"])


def recipe(
    size: str,
    model: PreTrainedModel | None = None,
    family: str | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
    lookups: Lookups | None = None,
) -> Recipe:
    """Return the settings for a size.

    Args:
        size: ``"13x"``, ``"20x"`` or ``"30x"``; the file becomes at least this many times smaller
            than in float32.
        model: the model to be compressed, which is not changed; may be on the meta device. None:
            settings for a model of the size of BERT, GPT-2 or ResNet-50.
        family: ``"encoder"``, ``"language_model"`` or ``"image_model"``. None: that of the model
            (image model: most weights are in convolutions; language model: it generates text;
            encoder: all others); ``"encoder"`` without a model.
        batches: a few training batches, each the keyword arguments of a forward, to allocate bits
            to the weights of the finetuned model (:func:`allocate_bits`). None: one block size for
            each group of layers. Image models always have the latter.
        lookups: :func:`count_lookups` of all training data, if possible; None counts those of the
            batches.

    Raises:
        TypeError: if the model is not a ``PreTrainedModel``.
        ValueError: if size or family is unknown, the model cannot reach the size, or there are
            batches but no model.
    """
    if size not in TRAINING:
        raise invalid("size", size, f"one of {', '.join(TRAINING)}")
    if family is not None and family not in FAMILIES:
        raise invalid("family", family, f"one of {', '.join(FAMILIES)}")
    if model is None:
        if batches is not None:
            raise ValueError("batches are given without a model; pass the finetuned model")
        family = ENCODER if family is None else family
        model = reference_model(family)
    else:
        require_instance("model", model, PreTrainedModel, "a transformers model", "pass a model")
        family = family_of(model) if family is None else family
    if batches is not None and family in ALLOCATED:
        quantization, times_smaller = _allocated(size, model, family, batches, lookups)
    else:
        quantization, times_smaller = _storage(size, model, family)
    training = TRAINING[size]
    noise = QuantNoiseConfig.matching(
        quantization,
        model,
        noise="pq",
        p=1.0,
        learn_codebooks=True,
        codebook_update=_CODEBOOK_UPDATE.get(family),
    )
    compression = CompressionArguments(
        stage_epochs=0,
        codebook_learning_rate=training.codebook_learning_rate,
        budget_batches=BUDGET_BATCHES,
    )
    return Recipe(size, family, times_smaller, quantization, noise, compression, training.length)


def _candidates(family: str, frequent_rows: int | None) -> Iterator[IPQConfig]:
    for n_centroids in _N_CENTROIDS:
        for blocks in _BLOCKS[family]:
            block_size = dict(blocks)
            rare = block_size.pop("rare", None)
            in_groups: dict[str, Any] = {}
            if rare is not None and frequent_rows is not None:
                in_groups = {"frequent_rows": frequent_rows, "rare_block_size": rare}
            # One stage: the noise has trained all layers together.
            yield IPQConfig(
                block_size=block_size, n_centroids=n_centroids, stages=[".*"], **in_groups
            )


def _storage(size: str, model: PreTrainedModel, family: str) -> tuple[IPQConfig, float]:
    """Return the first candidate that reaches a size, and how many times smaller it is.

    Raises:
        ValueError: if there is none.
    """
    dense, reached = _dense_bytes(model), 1.0
    check_can_be_packed(model)
    for config in _candidates(family, _frequent_rows(model)):
        try:
            times_smaller = dense / file_bytes(model, config)
        except ValueError:  # it fits no layer of a small model
            continue
        if times_smaller >= float(size.removesuffix("x")):
            return config, times_smaller
        reached = max(reached, times_smaller)
    raise _unreachable(size, model, "the block sizes of the recipes make", reached)


def _unreachable(size: str, model: PreTrainedModel, what: str, reached: float) -> ValueError:
    return ValueError(
        f"invalid size={size!r}: {what} this {type(model).__name__} with "
        f"{_dense_bytes(model) / 4e6:.2f} M parameters at most {reached:.1f} times smaller; use a "
        "smaller size or your own IPQConfig"
    )


def _allocated(
    size: str,
    model: PreTrainedModel,
    family: str,
    batches: Iterable[Mapping[str, Any]],
    lookups: Lookups | None,
) -> tuple[IPQConfig, float]:
    """Return a config with allocated bits, and how many times smaller the model becomes.

    Raises:
        ValueError: if no bit allocation reaches the size.
    """
    check_can_be_packed(model)
    dense, target = _dense_bytes(model), size_target(size, model, family)
    reached = dense / smallest_bytes(model, target)
    if reached < float(size.removesuffix("x")):
        raise _unreachable(size, model, "bit allocation makes", reached)
    config = allocate_bits(model, target, batches, lookups=lookups)
    return config, dense / file_bytes(model, config)


def size_target(size: str, model: PreTrainedModel, family: str) -> IPQConfig:
    """Return the config from which bits are allocated for a size."""
    in_groups: dict[str, Any] = {}
    if family == ENCODER and (frequent_rows := _frequent_rows(model)) is not None:
        in_groups = {"frequent_rows": frequent_rows}
    megabytes = _dense_bytes(model) / float(size.removesuffix("x")) / 1e6
    return IPQConfig(target_size_mb=megabytes, stages=[".*"], **in_groups)


def _dense_bytes(model: PreTrainedModel) -> int:
    return 4 * sum(parameter.numel() for parameter in model.parameters())


def _frequent_rows(model: PreTrainedModel) -> int | None:
    """Return how many rows of a table of token ids count as frequent; None without a table."""
    rows = [layer.rows for layer in find_layers(model) if layer.input_table]
    return max(rows) // FREQUENT_ROWS if rows else None
