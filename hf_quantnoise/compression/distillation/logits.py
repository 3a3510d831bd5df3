"""Distillation of logits: which outputs of a head are compared, how, and at which positions.

The head is found by the class of the model. Register a function for any other class with
``@HEADS.register("ClassName")``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
)

from ...modeling.padding import IGNORED, tensor_labels
from ...registry import Registry
from ..training.loss_normalization import without_adapters
from .losses import sigmoid_divergence, softmax_divergence, squared_error

# (student's outputs, teacher's outputs, inputs, temperature) -> divergence.
Head = Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any], float], Tensor]
HEADS: Registry[Head] = Registry("head")
_HEADS = f"{__name__}.HEADS"

_PAIR_LOGITS = ("logits_per_image", "logits_per_text")
_SPAN_LOGITS = ("start_logits", "end_logits")
_MASKED_SCORE = -1e9
_KINDS = {
    "causal language model": {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()},
    "question answering": {*MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES.values()},
    "semantic segmentation": {*MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES.values()},
    "replaced tokens": {"ElectraForPreTraining", "FunnelForPreTraining"},
    # Not in HEADS: their logits are pixels, or do not cover the boxes.
    "object detection": {*MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES.values()},
    "masked image": {"HieraForPreTraining", "ViTMAEForPreTraining", "VideoMAEForPreTraining"},
}
# Their classes do not show whether they are decoder-only models.
_READERS_OF_IMAGES = {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
_READERS_OF_IMAGES -= {"DiffusionGemmaForBlockDiffusion"}  # not from left to right


def head_name(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Return the name of a model's head in :data:`HEADS`.

    If the config has no ``problem_type``, float labels of shape (batch, labels) in the batch select
    multi-label classification; a single label is regression in any shape.
    """
    model = without_adapters(model)
    name = type(model).__name__
    if name in HEADS:
        return name
    for kind, classes in _KINDS.items():
        if name in classes:
            return kind
    config = getattr(model, "config", None)
    if name in _READERS_OF_IMAGES and not getattr(config, "is_encoder_decoder", False):
        return "causal language model"
    problem = getattr(config, "problem_type", None)
    labels = tensor_labels(inputs)
    if problem is None and labels is not None and labels.dim() == 2 and labels.is_floating_point():
        # As in the loss of transformers, which sets the type in its first forward with labels.
        is_regression = getattr(config, "num_labels", None) == 1
        problem = "regression" if is_regression else "multi_label_classification"
    return str(problem) if problem in HEADS else "classification"


def logits_divergence(
    model: nn.Module,
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    inputs: Mapping[str, Any],
    temperature: float = 1.0,
) -> Tensor:
    """Return the divergence of the student's predictions from the teacher's.

    The class of ``model``, the student, selects the head. The labels and masks of the inputs select
    the positions that count.
    """
    name, kind = head_name(model, inputs), type(without_adapters(model)).__name__
    if name in _KINDS and name not in HEADS:
        raise ValueError(
            f"cannot distill a {kind}: the logits of its {name} head are not all that it predicts, "
            f"or no classes; register a function for the class in {_HEADS}, or set distill=False"
        )
    try:
        return HEADS[name](student, teacher, inputs, temperature)
    except KeyError as missing:
        if name == "classification" and "logits" not in student:  # the head of unknown classes
            raise ValueError(
                f"cannot distill a {kind}: its head is unknown, and its outputs "
                f"({', '.join(student)}) have no 'logits'; register a function for the class in "
                f"{_HEADS}, or set distill=False"
            ) from None
        raise ValueError(
            f"cannot compare a {name} head: the outputs have no {missing} (the student, a {kind}, "
            f"returns {', '.join(student)}, the teacher {', '.join(teacher)}); register a function "
            f"for the head in {_HEADS}, or set distill=False"
        ) from None


def label_mask(inputs: Mapping[str, Any], logits: Tensor) -> Tensor | None:
    """Return which positions count, as booleans of shape (batch, positions); None for all.

    These are the positions with a label other than -100; without labels, all except padding.
    ``logits`` has shape (batch, positions, classes).
    """
    if logits.dim() != 3:
        return None
    labels = tensor_labels(inputs)
    if labels is not None:
        return labels != IGNORED if labels.shape == logits.shape[:2] else None
    decodes = any(name in inputs for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    mask = inputs.get("decoder_attention_mask" if decodes else "attention_mask")
    return mask.bool() if mask is not None and mask.shape == logits.shape[:2] else None


@HEADS.register("classification", "single_label_classification")
def classification_divergence(student, teacher, inputs, temperature):
    """Compare the classes of each example or token; a single class is regression."""
    logits = student["logits"]
    divergence = squared_error if logits.shape[-1] == 1 else softmax_divergence
    return divergence(logits, teacher["logits"], temperature, label_mask(inputs, logits))


@HEADS.register("regression")
def regression_divergence(student, teacher, inputs, temperature):
    """Compare one or more regression outputs."""
    return squared_error(student["logits"], teacher["logits"])


@HEADS.register("multi_label_classification")
def multi_label_divergence(student, teacher, inputs, temperature):
    """Compare independent labels."""
    return sigmoid_divergence(student["logits"], teacher["logits"], temperature)


@HEADS.register("causal language model")
def next_token_divergence(student, teacher, inputs, temperature):
    """Compare next tokens: position t counts if token t + 1 does, the last position never."""
    logits = student["logits"]
    mask = label_mask(inputs, logits)
    mask = None if mask is None else mask[:, 1:]
    return softmax_divergence(logits[:, :-1], teacher["logits"][:, :-1], temperature, mask)


@HEADS.register("replaced tokens")
def replaced_token_divergence(student, teacher, inputs, temperature):
    """Compare whether each token was replaced; logits have shape (batch, positions)."""
    logits, mask = student["logits"], inputs.get("attention_mask")
    mask = mask.bool() if mask is not None and mask.shape == logits.shape else None
    return sigmoid_divergence(logits, teacher["logits"], temperature, mask)


@HEADS.register("question answering")
def span_divergence(student, teacher, inputs, temperature):
    """Compare start and end of a span over all positions except padding; the mean of both."""
    mask = inputs.get("attention_mask")
    total = 0.0
    for name in _SPAN_LOGITS:
        scores = student[name], teacher[name]
        if mask is not None:
            scores = [score.float().masked_fill(mask == 0, _MASKED_SCORE) for score in scores]
        total = total + softmax_divergence(*scores, temperature)
    return total / len(_SPAN_LOGITS)


@HEADS.register("semantic segmentation")
def segmentation_divergence(student, teacher, inputs, temperature):
    """Compare the classes of each pixel; logits have shape (batch, classes, height, width)."""
    logits = student["logits"].movedim(1, -1), teacher["logits"].movedim(1, -1)
    return softmax_divergence(*logits, temperature)


@HEADS.register("CLIPModel")
def contrastive_divergence(student, teacher, inputs, temperature):
    """Compare the texts of each image and the images of each text; the mean of both."""
    total = 0.0
    for name in _PAIR_LOGITS:
        total = total + softmax_divergence(student[name], teacher[name], temperature)
    return total / len(_PAIR_LOGITS)
