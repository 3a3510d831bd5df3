"""State dicts that hold a packed layer's state as it is in files: 8-bit centroids as codes.

transformers' loading has no part in this; it fills parameters by itself (``convert.read_states``).
"""

from __future__ import annotations

from torch import Tensor, nn

# Attribute of a layer that keeps what came of its state while some of it is still to come.
COME = "_stored_state"


def take_stored(
    layer: nn.Module, names: dict[str, str], state_dict: dict[str, Tensor], assign: bool
) -> list[str]:
    """Puts working centroids in place of stored ones, before a state dict is copied into a layer.

    Codes mean something only beside the scale and zero point that they were made with. ``Trainer``
    reads the shards of a checkpoint one by one, so those may come earlier or later: codes are held
    back until all is there, and torch names them as missing. Centroids that are numbers (those of a
    state dict of the memory) are left as they are.

    Args:
        layer: a packed layer.
        names: key of the quantizer's state -> its name in the state dict.
        state_dict: changed in place.
        assign: whether its tensors will be the layer's own; they keep their dtype then.

    Returns:
        What is wrong with it; such tensors are taken out.
    """
    own = layer.state
    come = {key: state_dict[name] for key, name in names.items() if name in state_dict}
    if any(tensor.shape != own[key].shape for key, tensor in come.items()):
        return []  # torch tells of it
    codes = [key for key, tensor in come.items() if not tensor.is_floating_point()]
    for key in codes:
        del state_dict[names[key]]
    if not layer.quantizer.has_storage_form:
        return [
            f"{names[key]} is of dtype {come[key].dtype}, and the model stores its own as "
            f"{layer.quantizer.short_name}: the file is of a model that was stored in another way; "
            "load that one with from_pretrained"
            for key in codes
        ]
    known = {**vars(layer).pop(COME, {}), **come}
    if "codebook" in known and known["codebook"].is_floating_point():
        return []
    if known.keys() < names.keys():
        if known:
            vars(layer)[COME] = known
        return []
    if not assign:  # as transformers casts what it reads
        known = {
            key: tensor.to(own[key].dtype) if tensor.is_floating_point() else tensor
            for key, tensor in known.items()
        }
    state_dict[names["codebook"]] = layer.quantizer.from_storage(known)["codebook"]
    return []
