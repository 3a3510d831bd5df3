"""The state of packed layers as files hold it, and conversion to and from the state in memory.

``Quantizer.to_storage`` and ``from_storage`` convert one state. Files may hold it in smaller
dtypes; 8-bit centroids are codes there, which are only meaningful with their scale and zero point.
"""

from __future__ import annotations

from torch import Tensor, nn


def decode_state_dict(
    layer: nn.Module,
    names: dict[str, str],
    state_dict: dict[str, Tensor],
    partial_state: dict[str, Tensor],
    assign: bool,
) -> None:
    """Replace stored centroids by working ones, before a state dict is copied into a layer.

    ``Trainer`` loads the shards of a checkpoint one by one, so scale and zero point may be in
    another shard than the codes. Codes are held back until all is there; torch reports them as
    missing if they never are. Centroids that are floats (a state dict taken from memory) are kept.

    ``names`` maps keys of the quantizer's state to names in the state dict; ``partial_state`` holds
    the tensors of earlier shards. Both dicts of tensors are changed in place. With ``assign`` the
    layer will hold the tensors of the state dict, which keep their dtype.
    """
    state, quantizer = layer.state, layer.quantizer
    found = {key: state_dict[name] for key, name in names.items() if name in state_dict}
    if any(tensor.shape != state[key].shape for key, tensor in found.items()):
        return  # torch raises
    if not quantizer.encodes_state:
        return
    if "codebook" in found and not found["codebook"].is_floating_point():
        del state_dict[names["codebook"]]
    known = {**partial_state, **found}
    partial_state.clear()
    if "codebook" in known and known["codebook"].is_floating_point():
        return
    if known.keys() < names.keys():
        partial_state.update(known)
        return
    if not assign:  # as transformers casts the tensors that it loads
        for key, tensor in known.items():
            known[key] = tensor.to(state[key].dtype) if tensor.is_floating_point() else tensor
    state_dict[names["codebook"]] = quantizer.from_storage(known)["codebook"]
