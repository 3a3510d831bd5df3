"""Whether a model divides its loss by the number of labels of all micro-batches of a step."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.utils import logging

from ...modeling.padding import IGNORED

logger = logging.get_logger(__name__)

_PASSES_KWARGS_ON = re.compile(r"loss_function\([^()]*(?:\([^()]*\)[^()]*)*\*\*", re.DOTALL)
_COUNT = "num_items_in_batch"
_READS_KWARGS = "fixed_cross_entropy"  # of transformers


def without_adapters(model: nn.Module) -> nn.Module:
    """Return the model inside a PEFT wrapper; any other model unchanged."""
    while hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model


def loss_reads_num_items(model: nn.Module) -> bool:
    """Return whether a model's loss is normalized by ``num_items_in_batch``.

    ``Trainer`` assumes so for every forward with ``**kwargs``. Many accept them and ignore them (a
    plain mean), which multiplies loss and gradient by the gradient accumulation steps: the heads of
    the BERT family, CTC, regression and independent labels. The answer is read from the code of the
    forward and of the loss function. False is right for all models, as their loss is a mean then;
    True also weights all labels of a step alike if micro-batches differ in how many they have.
    """
    model = without_adapters(model)
    try:
        source = inspect.getsource(type(model).forward)
    except (OSError, TypeError):
        logger.warning(
            f"cannot read the source of {type(model).__name__}.forward: with gradient accumulation,"
            " its loss is averaged over micro-batches, even if some have more labels than others"
        )
        return False
    return _PASSES_KWARGS_ON.search(source) is not None and _reads_num_items(model)


def _reads_num_items(model: Any) -> bool:
    """Return whether the loss function of a model reads what it is passed."""
    loss = getattr(model, "loss_function", None)
    if loss is ForSequenceClassificationLoss:
        # Other problems have plain means. Without a type, the labels of the first batch select it.
        problem = getattr(model.config, "problem_type", None)
        return bool(problem == "single_label_classification")
    while isinstance(loss, partial):
        loss = loss.func
    return callable(loss) and _counts_labels(inspect.unwrap(loss))


def _counts_labels(loss: Callable) -> bool:
    """Return whether a loss is normalized by the count of labels other than -100."""
    code = getattr(loss if hasattr(loss, "__code__") else type(loss).__call__, "__code__", None)
    if code is None:
        return False
    ignored = inspect.signature(loss).parameters.get("ignore_index")
    if ignored is not None and ignored.default != IGNORED:
        return False  # its mean is over other labels than Trainer counts
    passes_on = bool(code.co_flags & inspect.CO_VARKEYWORDS) and _READS_KWARGS in code.co_names
    return passes_on or _COUNT in (*code.co_varnames, *code.co_consts)
