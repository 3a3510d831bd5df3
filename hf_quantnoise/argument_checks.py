"""Checks of the arguments of public functions: a wrong object raises an error that names it.

Wrong types raise a ``TypeError``, right types with a wrong value a ``ValueError``.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

MAX_LENGTH = 100  # characters of a value or of another package's message


class _Short(reprlib.Repr):
    """``repr`` of plain values, shortened; other objects (tensors, models) by their type."""

    def __init__(self) -> None:
        super().__init__()
        self.maxdict, self.maxlist, self.maxtuple, self.maxset, self.maxlevel = 3, 4, 4, 4, 3
        self.maxstring = 60

    def repr_instance(self, x: Any, level: int) -> str:
        return repr(x) if isinstance(x, int | float | bytes | None) else f"<{type(x).__name__}>"


_SHORT = _Short()


def shorten(text: str) -> str:
    """Return the first line of a text as one sentence of at most :data:`MAX_LENGTH` characters."""
    line = text.strip().partition("\n")[0].rstrip(".").replace(". ", "; ")
    return line if len(line) <= MAX_LENGTH else f"{line[: MAX_LENGTH - 3]}..."


def describe(value: Any) -> str:
    """Return the type of an object, and the value if it is plain: ``str 'bert'``."""
    if value is None:
        return "None"
    name = getattr(type(value), "__name__", "object")
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, os.PathLike):
        return f"path {shorten(repr(os.fspath(value)))}"
    if type(value) in (str, int, float, bool, bytes, list, tuple, dict, set):
        return f"{name} {shorten(_SHORT.repr(value))}"
    return name


def require_instance(
    field: str, value: Any, kinds: type | tuple[type, ...], expected: str, way_out: str = ""
) -> None:
    """Raise a ``TypeError`` unless a value has one of some types.

    ``expected`` describes them; ``way_out`` ends the message, unless the value is one of the
    classes themselves.
    """
    if isinstance(value, kinds):
        return
    if isinstance(value, type) and issubclass(value, kinds):
        way_out = f"create one with {value.__name__}(...)"
    end = f"; {way_out}" if way_out else ""
    raise TypeError(f"invalid {field}: got {describe(value)}, expected {expected}{end}")


def require_dataset(field: str, value: Any) -> None:
    """Raise a ``TypeError`` if a name or a folder is passed in place of a dataset."""
    if isinstance(value, str | bytes | os.PathLike):
        raise TypeError(
            f"invalid {field}: got {describe(value)}, expected a dataset; load it first, e.g. with "
            "datasets.load_dataset"
        )


def as_float_dtype(value: Any) -> torch.dtype | None:
    """Return a floating-point dtype or None; raise a ``ValueError`` for anything else."""
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if value is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(
            f"invalid dtype={value!r}: expected a floating-point dtype, e.g. torch.bfloat16"
        )
    return dtype


# ---- models --------------------------------------------------------------------------------------


def require_model(
    model: Any, kind: type[nn.Module] = PreTrainedModel, field: str = "model"
) -> None:
    """Raise a ``TypeError`` that names what to pass instead, unless the object is a model.

    ``kind`` is ``PreTrainedModel``, or ``nn.Module`` for functions that take any module.
    """
    name = "transformers PreTrainedModel" if kind is PreTrainedModel else "model (an nn.Module)"
    require_instance(field, model, kind, f"a {name}", _instead_of(model))


def _instead_of(model: Any) -> str:
    """Return what to pass instead of an object that is not a model."""
    if isinstance(model, str | os.PathLike):
        return f"load it first, e.g. AutoModel.from_pretrained({shorten(repr(os.fspath(model)))})"
    if isinstance(model, type):
        return f"pass a model, e.g. of {model.__name__}.from_pretrained(...)"
    if isinstance(model, PreTrainedConfig):
        return "create the model first, e.g. with AutoModel.from_config(config)"
    if isinstance(model, Mapping):
        return "load the weights into a model with load_state_dict and pass the model"
    if hasattr(model, "merge_and_unload"):
        return "pass model.merge_and_unload(), which merges the adapters into the weights"
    if isinstance(model, nn.Module):
        inner = (name for name, m in model.named_modules() if isinstance(m, PreTrainedModel))
        if (name := next(inner, None)) is not None:
            return f"pass the model that it wraps, model.get_submodule({name!r})"
        return "use a model class of transformers, or a subclass of PreTrainedModel"
    if isinstance(getattr(model, "model", None), nn.Module):  # a pipeline, a trainer
        return f"pass the model of the {type(model).__name__}, its attribute .model"
    if callable(model) and not hasattr(model, "save_pretrained"):
        return "call it and pass the model that it returns"
    return "pass the model itself"


def require_weights(model: nn.Module, field: str = "model") -> None:
    """Raise a ``ValueError`` if weights are on the meta device, which have no values."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"invalid {field}: {name} is on the meta device and has no values; load the "
                "weights, e.g. with from_pretrained (without offloading to disk)"
            )


def require_in_memory(tensors: Iterable[tuple[str, Tensor]], reason: str) -> None:
    """Raise a ``ValueError`` if a named tensor is offloaded; ``reason`` ends the error."""
    offloaded = next((name for name, tensor in tensors if tensor.is_meta), None)
    if offloaded is not None:
        raise ValueError(f"invalid device_map: {offloaded} is offloaded, and {reason}")


# ---- batches -------------------------------------------------------------------------------------


def read_batches(field: str, data: Any) -> list[Mapping[str, Any]]:
    """Return the batches of calibration data, each the keyword arguments of a forward.

    None gives none. Raises a ``TypeError`` or ``ValueError`` that names the first wrong batch.
    """
    if data is None:
        return []
    example = "pass a list of dicts, e.g. [tokenizer(texts, padding=True, return_tensors='pt')]"
    if isinstance(data, Mapping | str | bytes | Tensor) or not isinstance(data, Iterable):
        got = f"got {describe(data)}, expected a list of batches"
        raise TypeError(f"invalid {field}: {got}; {example}")
    batches = list(data)
    if not batches and isinstance(data, Iterator):
        raise ValueError(
            f"invalid {field}: got {describe(data)} without batches, expected at least one; pass a "
            "list, since a generator can be read only once"
        )
    for number, batch in enumerate(batches):
        name = f"{field}[{number}]"
        if not isinstance(batch, Mapping):
            got = f"got {describe(batch)}, expected a dict of the model's inputs"
            raise TypeError(f"invalid {name}: {got}; {example}")
        require_tensors(name, batch)
    return batches


def require_tensors(field: str, inputs: Mapping[str, Any]) -> None:
    """Raise a ``TypeError`` if none of a model's inputs is a tensor."""
    if not any(_has_tensor(value) for value in inputs.values()):
        got = {str(name): value for name, value in inputs.items()}
        raise TypeError(
            f"invalid {field}: got {describe(got)}, expected tensors with a batch dimension; pass "
            "e.g. tokenizer(texts, padding=True, return_tensors='pt')"
        )


class FoundWhileRunning(ValueError):
    """An invalid setting that is found while a model runs, not a fault of the batch."""


def _has_tensor(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_has_tensor, value))
    return isinstance(value, Tensor) and not value.is_meta


def run_batch(
    model: nn.Module,
    batch: Mapping[str, Any],
    field: str = "calibration_data",
    way_out: str = "pass batches for which model(**batch) works",
) -> Any:
    """Return ``model(**batch)``; the error of a batch that does not fit names the field."""
    try:
        return model(**batch)
    except (torch.OutOfMemoryError, FoundWhileRunning):
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        shapes = (
            f"{name} {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}"
            for name, value in batch.items()
        )
        raise ValueError(
            f"invalid {field}: {type(model).__name__} cannot run a batch of "
            f"{shorten(', '.join(shapes))} ({shorten(str(error))}); {way_out}"
        ) from error


# ---- folders and repositories --------------------------------------------------------------------


def require_path(field: str, path: Any) -> str:
    """Return a path as a string; raise a ``TypeError`` if it is none."""
    expected = "the name of a folder or of a Hub repository"
    require_instance(field, path, (str, os.PathLike), expected, "pass a string or a Path")
    return os.fspath(path)


def require_output_folder(field: str, path: Any) -> str:
    """Return the path of a folder to write; raise an error if it is a file, or not a path."""
    require_instance(field, path, (str, os.PathLike), "an output folder", "pass a string or a Path")
    if os.path.exists(path) and not os.path.isdir(path):
        raise NotADirectoryError(
            f"invalid {field}={os.fspath(path)!r}: it is a file, expected a folder; choose another "
            "name"
        )
    return os.fspath(path)


def require_repo_id(repo_id: Any) -> None:
    """Raise an error unless an object is a valid name of a repository."""
    expected = "the name of a repository"
    require_instance("repo_id", repo_id, str, expected, "pass e.g. 'user/name'")
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(
            f"invalid repo_id={repo_id!r}: expected 'name' or 'user/name' of at most 96 letters, "
            "digits and '-', '_', '.'; choose another name"
        ) from None
