"""The id of saved weights: a checksum in ``config.json`` and in the metadata of each file.

Files of different saves have different ids, so files that an interrupted save or an incomplete copy
has mixed are found when the model is loaded. It is a checksum, not a random number, so that saving
a loaded model writes identical files. Files of earlier releases have none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key
from transformers.utils import CONFIG_NAME, logging

from ..compat import ignored_on_save, load_offloaded_parameter
from ..files.durable import write_json
from ..files.model_folders import variant_of
from ..files.reading import Header, read_json
from ..text import shown

logger = logging.get_logger(__name__)

WEIGHTS_ID = "weights_id"
ID_LENGTH = 32


def id_of_weights(model: PreTrainedModel, state_dict: dict[str, Tensor]) -> str:
    """Return the id of the tensors that a model saves: their names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(state_dict.keys() - ignored_on_save(model)):
        tensor = state_dict[name].detach()
        if tensor.is_meta:
            tensor = load_offloaded_parameter(model, name)
        if hasattr(tensor, "to_local"):  # sharded: the part of this rank
            tensor = tensor.to_local()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:ID_LENGTH]


def in_fixed_order(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in the order in which transformers saves some of the loaded models.

    The order determines the shards. In memory it differs before and after loading.
    """
    return {name: state_dict[name] for name in sorted(state_dict, key=dot_natural_key)}


def require_one_save(headers: Mapping[str, Header], weights_id: str | None) -> None:
    """Raise ValueError if files, by path, have another id than their ``config.json``.

    If none of them has an id, another program may have rewritten them, so this is only a warning.
    The files of a variant have another id: the config has that of the files without variant.
    """
    ids = {file: header.metadata.get(WEIGHTS_ID) for file, header in headers.items()}
    if any(variant_of(os.path.basename(file)) for file in ids):
        weights_id = next(iter(ids.values()))
    others = {file: found for file, found in ids.items() if found != weights_id}
    if not others:
        return
    folder = os.path.dirname(next(iter(others)))
    if not any(ids.values()):
        logger.warning(
            f"the files of weights in {folder!r} have no {WEIGHTS_ID}, but config.json has one: "
            "another program has rewritten them, or config.json belongs to another save"
        )
        return
    names = ", ".join([os.path.basename(file) for file in others][:3])
    got, expected = shown(next(iter(others.values()))), shown(weights_id)
    raise ValueError(
        f"invalid {WEIGHTS_ID} in {folder!r}: got {got} in {names}, expected {expected} as in "
        "config.json: the files are of different saves, as after an incomplete copy; save or "
        "download the model again into an empty folder"
    )


def keep_id_of_default(part: str, folder: str) -> None:
    """Keep the id in the config of a folder whose weights without variant stay there.

    ``part`` has a variant of them and its config, which will replace the folder's.
    """
    config = os.path.join(folder, CONFIG_NAME)
    has_default = any(variant_of(name) == "" for name in os.listdir(folder))
    if not has_default or not os.path.isfile(config):
        return
    old, new = read_json(config), read_json(os.path.join(part, CONFIG_NAME))
    if isinstance(quantization := old.get("quantization_config"), dict):
        new["quantization_config"][WEIGHTS_ID] = quantization.get(WEIGHTS_ID)
        write_json(new, os.path.join(part, CONFIG_NAME))


def sort_metadata(folder: str) -> None:
    """Sort the metadata in safetensors files, which safetensors writes in a random order."""
    for name in os.listdir(folder):
        if not name.endswith(".safetensors"):
            continue
        with open(os.path.join(folder, name), "r+b") as file:
            match = re.match(rb'.{8}{"__metadata__":({[^{}]*})', file.read(1000), re.DOTALL)
            if match is None:
                continue
            metadata = json.dumps(json.loads(match[1]), sort_keys=True, separators=(",", ":"))
            if len(metadata.encode()) == len(match[1]):
                file.seek(match.start(1))
                file.write(metadata.encode())
