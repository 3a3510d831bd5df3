"""Few inputs: multiply them with each centroid once, and add up products instead of weights.

An input of q blocks and K centroids have q K products. An output is the sum of q of them, one for
each block of its row of codes. For a matrix of many more rows than centroids this is less work
than a product with the decoded weight: one addition for each block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...quantizers import ProductQuantizer
from .case import Case, bias_of, codes_of, in_slices

# The products take columns / block_size * K * 4 bytes per input. With more inputs than this, or
# more blocks, they leave the caches; with fewer rows, they take longer than they save.
MAX_INPUTS = 64
MAX_BYTES = 8 * 2**20
MIN_BLOCK_SIZE = 8
MIN_ROWS_PER_CENTROID = 5


def is_available() -> bool:
    """Return True: it is made of operations of torch."""
    return True


def supports(layer: Any, case: Case) -> bool:
    """Return whether the layer has large blocks and many rows, and the inputs are a few."""
    quantizer = layer.quantizer
    if case.device != "cpu" or case.dtype != torch.float32 or case.is_autocast:
        return False
    if not case.has_memory:  # vmap has no rule for sums of bags
        return False
    if type(quantizer) is not ProductQuantizer or quantizer.block_size < MIN_BLOCK_SIZE:
        return False
    n_products = layer.columns // quantizer.block_size * quantizer.n_centroids * case.n_inputs
    return (
        0 < case.n_inputs <= MAX_INPUTS
        and n_products * case.dtype.itemsize <= MAX_BYTES
        and layer.rows >= MIN_ROWS_PER_CENTROID * quantizer.n_centroids
    )


def run(layer: Any, inputs: Tensor, case: Case) -> Tensor:
    """Return the outputs, in float32."""
    quantizer, state = layer.quantizer, layer.state
    codebook, size = quantizer.centroids(state), quantizer.block_size
    n_blocks, n_centroids = layer.columns // size, len(codebook)
    blocks = inputs.reshape(-1, n_blocks, size).permute(1, 2, 0)
    products = torch.matmul(codebook, blocks).flatten(0, 1)  # (blocks * centroids, inputs)
    first = torch.arange(
        0, n_blocks * n_centroids, n_centroids, dtype=torch.int32, device=inputs.device
    )

    def part(rows: slice) -> Tensor:
        sums = F.embedding_bag(codes_of(layer, rows).int().add_(first), products, mode="sum")
        if quantizer.row_scale:
            sums.mul_(quantizer.scales(state)[rows])
        outputs, bias = sums.t(), bias_of(layer, rows)
        return outputs.contiguous() if bias is None else outputs + bias

    outputs = in_slices(layer, case, 1, part)  # an int32 for each block
    return outputs.view(*inputs.shape[:-1], layer.rows)
