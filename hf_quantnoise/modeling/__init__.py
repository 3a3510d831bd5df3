"""Packed layers, whose weights are codes in memory and in files, and the packing of models."""

from . import save_check  # noqa: F401
from .convert import pack_layer, packed_layers, packed_names, stored_tensors
from .packed import PackedLayer

__all__ = ["PackedLayer", "pack_layer", "packed_layers", "packed_names", "stored_tensors"]
