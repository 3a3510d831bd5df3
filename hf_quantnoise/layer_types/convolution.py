"""Convolutions: each row is an output channel, each block one kernel or a row of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compat import conv_padding
from .record import LayerType, register_layer_type


def convolution_type(layer_class: type[nn.Module]) -> LayerType:
    """Return the record of a convolution over any number of dimensions.

    The weight is (out, in / groups, *kernel): grouped and depthwise ones have fewer columns.
    """
    return LayerType(
        layer_class=layer_class,
        to_matrix=lambda weight: weight.flatten(1),
        from_matrix=Tensor.reshape,
        packed_forward=layer_class,  # it reads the weight once
        input_energy=_input_energy,
        group="conv",
        kernel_block=_kernel_block,
        input_size=lambda layer: int(layer.in_channels),
        features_last=False,
    )


# Kernels with more weights are cut into their rows.
MAX_KERNEL_BLOCK = 9


def _kernel_block(layer: nn.Module) -> int:
    """Return the number of weights of a kernel or of a row of it, or 1 if any block size will do.

    Section 7.8 has blocks of 9 for 3 x 3 kernels, and of 5 for 5 x 5. Any block size will do if the
    layer is a Linear on other inputs: kernels of one element, and patches that do not overlap (a
    ViT's embedding).
    """
    kernel, stride = tuple(layer.kernel_size), tuple(layer.stride)
    if stride == kernel and layer.groups == 1:
        return 1
    area = math.prod(kernel)
    return int(kernel[-1]) if area > MAX_KERNEL_BLOCK and kernel[-1] > 1 else area


def _input_energy(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Return the sum of squares over unfolded patches, without the memory of ``F.unfold``."""
    dims = len(layer.kernel_size)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    squares = F.pad(inputs.float(), conv_padding(layer), mode=mode).square()
    sums = [window.sum((0, *range(2, dims + 2))) for window in _windows(layer, squares)]
    by_group = torch.stack(sums, 1).reshape(layer.groups, -1)
    if layer.groups == 1:
        return by_group
    return by_group.repeat_interleave(layer.out_channels // layer.groups, 0)


def _windows(layer: nn.Module, padded: Tensor) -> Iterator[Tensor]:
    """Yield, for each element of the kernel, the inputs that it is multiplied with."""
    for offsets in itertools.product(*map(range, layer.kernel_size)):
        window = padded
        for dim, offset in enumerate(offsets):
            reach = layer.dilation[dim] * (layer.kernel_size[dim] - 1)
            start, stop = layer.dilation[dim] * offset, padded.shape[dim + 2] - reach
            picked = torch.arange(0, stop, layer.stride[dim], device=padded.device) + start
            window = window.index_select(dim + 2, picked)
        yield window


register_layer_type(convolution_type(nn.Conv2d))
register_layer_type(convolution_type(nn.Conv1d))  # not transformers' Conv1D, which is a Linear
