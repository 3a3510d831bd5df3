"""``save_pretrained`` of packed models.

It does what the method of transformers does, and in addition replaces an older model at once
(``files/model_folders.py``) and saves the tokenizer or processor. ``push_to_hub`` calls it as well.
"""

from __future__ import annotations

import inspect
import os
from functools import partial, wraps
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..compat import has_adapter, load_offloaded_parameter
from ..configuration import QuantizedModelConfig
from ..distributed import is_rank_0
from ..files.model_folders import replaced_model
from ..modeling import packed_layers, packed_names, stored_tensors
from ..modeling.float16 import as_stored
from .processing import save_processing
from .weights_id import keep_id_of_default, sort_metadata

_METHOD = "save_pretrained"
_SIGNATURE = inspect.signature(PreTrainedModel.save_pretrained)


def attach_saving(model: PreTrainedModel) -> None:
    """Let a packed model save itself with :func:`save_packed`; its class stays the same."""
    # partial, as copies and pickles of the model refer to the copy then.
    vars(model)[_METHOD] = partial(save_packed, model)


def detach_saving(model: PreTrainedModel) -> None:
    """Undo :func:`attach_saving`."""
    vars(model).pop(_METHOD, None)


@wraps(PreTrainedModel.save_pretrained, assigned=("__doc__",))  # pickled by its own name
def save_packed(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """``PreTrainedModel.save_pretrained``, all or nothing, and with the tokenizer."""
    save = type(model).save_pretrained
    call = _SIGNATURE.bind(model, *args, **kwargs)
    values = {**call.arguments, **call.arguments.get("kwargs", {})}
    folder = os.fspath(values["save_directory"])
    if (
        not is_rank_0()
        or not values.get("is_main_process", True)
        or values.get("distributed_checkpoint")
        or has_adapter(model)  # which is all that is saved
        or os.path.isfile(folder)
    ):
        return save(model, *args, **kwargs)
    call.arguments["push_to_hub"] = False
    with replaced_model(folder) as part:
        call.arguments["save_directory"] = part
        save(*call.args, **call.kwargs)
        sort_metadata(part)
        if values.get("variant"):
            keep_id_of_default(part, folder)
        save_processing(model, part, folder)
    if values.get("push_to_hub"):
        further = dict(call.arguments.get("kwargs", {}))
        repo_id = further.pop("repo_id", os.path.basename(os.path.normpath(folder)))
        known = {key: values[key] for key in ("max_shard_size", "token") if key in values}
        model.push_to_hub(repo_id, **known, **further)
    return None


def stored_state_dict(model: PreTrainedModel, config: QuantizedModelConfig) -> dict[str, Tensor]:
    """Return the state dict of a packed model with tensors as they are saved; tied ones are one."""
    state_dict = model.state_dict()
    written: dict[int, Tensor] = {}

    def values_of(name: str) -> Tensor:
        tensor = state_dict[name]
        return load_offloaded_parameter(model, name) if tensor.is_meta else tensor

    for prefix, layer in packed_layers(model):
        in_memory = layer.tensors()
        tensors = {name: values_of(f"{prefix}.{name}") for name in packed_names(layer)}
        for name, tensor in stored_tensors(layer, tensors).items():
            written.setdefault(id(in_memory[name]), tensor)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in written:
            values = values_of(name)
            stored = as_stored(values, config)
            if stored is values:
                continue
            written[id(tensor)] = stored
        state_dict[name] = written[id(tensor)]
    return state_dict
