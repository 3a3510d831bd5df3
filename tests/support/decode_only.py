"""Packed models whose sums are those of dense layers."""

from torch import nn

from hf_quantnoise.modeling import packed_layers


def decode_only(model: nn.Module) -> nn.Module:
    """Make packed layers decode their weights, as they do if gradients are recorded.

    Other kernels add up in another order, so that outputs differ by rounding.
    """
    for _, layer in packed_layers(model):
        layer.kernels = ()
    return model
