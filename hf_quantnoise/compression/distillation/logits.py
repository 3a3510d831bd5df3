"""Which outputs of a head are compared with the teacher's, how, and where they count.

A head is found by the class of the model; one that is not known here joins with
``@HEADS.register("NameOfTheClass")``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
)

from ...modeling.padding import IGNORED
from ...registry import Registry
from ..training.packed_trainer import without_adapters
from .losses import sigmoid_divergence, softmax_divergence, squared_error

# (student's outputs, teacher's outputs, inputs, temperature) -> divergence.
Head = Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any], float], Tensor]
HEADS: Registry[Head] = Registry("head")

SPANS = ("start_logits", "end_logits")
_HIDDEN_SCORE = -1e9
_KINDS = {
    "causal language model": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "question answering": MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "semantic segmentation": MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
}


def head_of(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """The name under which :data:`HEADS` has the head of a model.

    Args:
        model: the student.
        inputs: of a forward; labels that are fractions say that classes do not exclude each other,
            where the config does not.
    """
    model = without_adapters(model)
    name = type(model).__name__
    if name in HEADS:
        return name
    for kind, classes in _KINDS.items():
        if name in _flat(classes.values()):
            return kind
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    labels = inputs.get("labels")
    if problem is None and labels is not None and labels.dim() == 2 and labels.is_floating_point():
        problem = "multi_label_classification"
    return problem if problem in HEADS else "classification"


def _flat(classes: Iterable[str | tuple[str, ...] | None]) -> set[str]:
    together = ((each,) if isinstance(each, str) else each or () for each in classes)
    return set(chain.from_iterable(together))


def logits_divergence(
    model: nn.Module,
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    inputs: Mapping[str, Any],
    temperature: float = 1.0,
) -> Tensor:
    """How far the student's predictions are from the teacher's.

    Args:
        model: the student, which says what its head is.
        student, teacher: outputs of both.
        inputs: the batch: labels or masks say which positions count.
        temperature: T of the divergence.

    Raises:
        ValueError: if an output that the head is compared by is missing, or the shapes differ.
    """
    name = head_of(model, inputs)
    try:
        return HEADS[name](student, teacher, inputs, temperature)
    except KeyError as missing:
        raise ValueError(
            f"the outputs have no {missing}, which a head for {name} is compared by; the student "
            f"({type(without_adapters(model)).__name__}) gives {', '.join(student)}, the teacher "
            f"{', '.join(teacher)}. Register a function for the head "
            "(hf_quantnoise.compression.distillation.logits.HEADS), or set distill=False"
        ) from None


def counted_positions(inputs: Mapping[str, Any], logits: Tensor) -> Tensor | None:
    """The positions of a sequence that count: those with a label (not -100); without labels those
    that are no padding.

    Args:
        inputs: the batch.
        logits: shape (batch, positions, classes).

    Returns:
        Boolean, shape (batch, positions); None where all count.
    """
    if logits.dim() != 3:
        return None
    labels = inputs.get("labels")
    if labels is not None:
        return labels != IGNORED if labels.shape == logits.shape[:2] else None
    decodes = any(name in inputs for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    mask = inputs.get("decoder_attention_mask" if decodes else "attention_mask")
    return mask.bool() if mask is not None and mask.shape == logits.shape[:2] else None


@HEADS.register("classification", "single_label_classification")
def of_classes(student, teacher, inputs, temperature):
    """One set of classes: of an example, or of each token (masked LM, token classification,
    encoder-decoder). With a single one it is a number."""
    logits = student["logits"]
    divergence = squared_error if logits.shape[-1] == 1 else softmax_divergence
    return divergence(logits, teacher["logits"], temperature, counted_positions(inputs, logits))


@HEADS.register("regression")
def of_numbers(student, teacher, inputs, temperature):
    """One or more numbers."""
    return squared_error(student["logits"], teacher["logits"])


@HEADS.register("multi_label_classification")
def of_labels(student, teacher, inputs, temperature):
    """Labels of which several may hold."""
    return sigmoid_divergence(student["logits"], teacher["logits"], temperature)


@HEADS.register("causal language model")
def of_next_tokens(student, teacher, inputs, temperature):
    """Position t predicts token t + 1: it counts if that one does, and the last never counts."""
    logits = student["logits"]
    counted = counted_positions(inputs, logits)
    counted = None if counted is None else counted[:, 1:]
    return softmax_divergence(logits[:, :-1], teacher["logits"][:, :-1], temperature, counted)


@HEADS.register("question answering")
def of_spans(student, teacher, inputs, temperature):
    """Start and end, each over the positions that are no padding; the mean of both."""
    mask = inputs.get("attention_mask")
    total = 0.0
    for name in SPANS:
        scores = student[name], teacher[name]
        if mask is not None:
            scores = [one.float().masked_fill(mask == 0, _HIDDEN_SCORE) for one in scores]
        total = total + softmax_divergence(*scores, temperature)
    return total / len(SPANS)


@HEADS.register("semantic segmentation")
def of_pixels(student, teacher, inputs, temperature):
    """Logits of shape (batch, classes, height, width)."""
    maps = student["logits"].movedim(1, -1), teacher["logits"].movedim(1, -1)
    return softmax_divergence(*maps, temperature)
