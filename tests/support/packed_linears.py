"""Packed layers whose codes are looked at."""

import torch
from torch import nn

from hf_quantnoise.modeling import pack_layer
from hf_quantnoise.quantizers import AdditiveQuantizer, ProductQuantizer

QUANTIZERS = {
    "pq": ProductQuantizer(4, 32),
    "pq-5bit-int8": ProductQuantizer(4, 20, codebook_bits=8),
    "pq-half": ProductQuantizer(8, 16, codebook_bits=16),
    "row-scale": ProductQuantizer(4, 32, row_scale=True),
    "additive": AdditiveQuantizer(8, 16),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed_linear(quantizer, rows=64, columns=64):
    layer = nn.Linear(columns, rows, bias=False)
    layer.weight.data = normal(rows, columns)
    pack_layer(layer, quantizer)
    return layer


class Regression(nn.Module):
    """The mean squared error of one packed layer."""

    def __init__(self, quantizer):
        super().__init__()
        self.layer = packed_linear(quantizer)

    def forward(self, x, labels):
        return {"loss": (self.layer(x) - labels).square().mean()}
