"""Changes to an ONNX graph after it was traced."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..modeling.packed import PREFIX

# Smaller tensors are not worth an operator.
_MIN_SIZE = 64


def may_fold(node: Any) -> bool | None:
    """Return False for nodes that read codes or codebooks, None (decide by size) for all others.

    Only nodes with constant inputs are folded, so everything computed from these is kept too.
    """
    names = (value.name for value in node.inputs if value is not None)
    return False if any(map(_is_packed, names)) else None


def _is_packed(name: str | None) -> bool:
    return (name or "").rpartition(".")[2].startswith(PREFIX)


def strip_metadata(program: Any) -> None:
    """Remove the Python stack trace of each node, which can be larger than small weights."""
    nodes = list(program.graph.all_nodes())
    values = [*program.graph.initializers.values(), *(v for node in nodes for v in node.outputs)]
    for part in (program, *nodes, *values):
        part.metadata_props.clear()


def store_as_float16(program: Any, round_matrices: bool) -> None:
    """Store float32 tensors as float16, which the graph converts back.

    Args:
        program: the model of onnx_ir.
        round_matrices: whether dense matrices are rounded. Otherwise only tensors are converted
            whose values are float16 values already, as those of ``leftover_bits=8`` are.
    """
    import onnx_ir as ir

    graph = program.graph
    for value in list(graph.initializers.values()):
        if value.dtype != ir.DataType.FLOAT or value.const_value.size < _MIN_SIZE:
            continue
        array = value.const_value.numpy()
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        is_rounded = round_matrices and array.ndim > 1 and not _is_packed(value.name)
        if not np.array_equal(half, array) and not (is_rounded and np.isfinite(half).all()):
            continue
        stored = ir.Value(
            name=f"{value.name}.float16",
            shape=value.shape,
            type=ir.TensorType(ir.DataType.FLOAT16),
            const_value=ir.tensor(half),
        )
        node = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT})
        value.replace_all_uses_with(node.outputs[0])
        graph.initializers.pop(value.name)
        graph.register_initializer(stored)
        graph.insert_before(graph[0], node)
