"""A change to ``PreTrainedModel.save_pretrained``."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers import PreTrainedModel


def check_before_saving(check: Callable[[PreTrainedModel], None]) -> None:
    """Call a function with each model that is about to be saved; it raises to prevent this.

    transformers asks only the quantizer of the saved model itself, not those of models in it.
    """
    original = PreTrainedModel.save_pretrained

    @wraps(original)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        check(self)
        return original(self, *args, **kwargs)

    PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]
