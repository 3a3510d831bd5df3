"""``save_pretrained`` of packed models.

It does what the method of transformers does, and in addition replaces an older model at once
(``files/model_folders.py``) and saves the tokenizer or processor. ``push_to_hub`` calls it as well.
"""

from __future__ import annotations

import inspect
import os
from functools import partial, wraps
from typing import Any

from transformers import PreTrainedModel

from ..compat import has_adapter
from ..distributed import is_rank_0
from ..files.model_folders import replaced_model
from .processing import save_processing
from .weights_id import sort_metadata

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
        save_processing(model, part, folder)
    if values.get("push_to_hub"):
        further = dict(call.arguments.get("kwargs", {}))
        repo_id = further.pop("repo_id", os.path.basename(os.path.normpath(folder)))
        known = {key: values[key] for key in ("max_shard_size", "token") if key in values}
        model.push_to_hub(repo_id, **known, **further)
    return None
