"""``nn.Embedding``: each row of the table is the vector of one word."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .record import LayerType, records_gradients, register_layer_type


class PackedEmbeddingForward(nn.Embedding):
    """Forward of a packed table: only the rows that are looked up are decoded."""

    def forward(self, input: Tensor) -> Tensor:
        if self.max_norm is not None or not self.rows_are_aligned:
            # Never sparse: the gradient of the centroids is dense.
            norm = self.max_norm, self.norm_type
            return F.embedding(input, self.weight, self.padding_idx, *norm, self.scale_grad_by_freq)
        rows = self.decode_rows(input.reshape(-1)).view(*input.shape, self.columns)
        if self.padding_idx is None or not (records_gradients() and rows.requires_grad):
            return rows
        # As in nn.Embedding, the padding row gives no gradient.
        return torch.where((input == self.padding_idx)[..., None], rows.detach(), rows)


register_layer_type(
    LayerType(
        layer_class=nn.Embedding,
        packed_forward=PackedEmbeddingForward,
        group="embeddings",
        input_size=lambda layer: 0,
        is_table=True,
    )
)
