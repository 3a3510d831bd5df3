"""The layer types that can be noised and packed: one record per type, one file per family.

A new type needs a file here that calls :func:`register_layer_type`, and its import below.
"""

from . import convolution, embedding, linear  # noqa: F401
from .record import (
    GROUPS,
    LAYER_TYPES,
    LayerType,
    known_layer_type,
    layer_type_of,
    records_gradients,
    register_layer_type,
)

__all__ = [
    "GROUPS",
    "LAYER_TYPES",
    "LayerType",
    "known_layer_type",
    "layer_type_of",
    "records_gradients",
    "register_layer_type",
]
