"""Packed layers, whose weights are codes in memory and in files, and the packing of models."""

from .convert import (
    decode_stored_states,
    is_packed,
    pack_layer,
    pack_skeleton,
    packed_layers,
    packed_names,
    stored_tensors,
    unpack_model,
)
from .packed import PackedLayer

__all__ = [
    "PackedLayer",
    "decode_stored_states",
    "is_packed",
    "pack_layer",
    "pack_skeleton",
    "packed_layers",
    "packed_names",
    "stored_tensors",
    "unpack_model",
]
