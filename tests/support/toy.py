"""A small module with a layer of every type, and noise on it."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_quantnoise import QuantNoiseConfig, apply_quant_noise


class Toy(nn.Module):
    """An embedding, a position table, one layer of every type and a tied head."""

    def __init__(self, **table) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(60, 32, **table)
        self.positions = nn.Embedding(16, 32)
        self.up = nn.Linear(32, 48)
        self.down = Conv1D(32, 48)
        self.head = nn.Linear(32, 60, bias=False)
        self.head.weight = self.words.weight

    def get_input_embeddings(self):
        return self.words

    def forward(self, ids):
        x = self.words(ids) + self.positions(torch.arange(ids.shape[-1]))
        return self.head(self.down(self.up(x).relu()))


IDS = torch.tensor([[1, 5, 1, 59], [0, 7, 7, 2]])


def noisy_toy(noise="proxy", p=0.3, **fields) -> Toy:
    settings = {"n_centroids": 16, **fields}
    return apply_quant_noise(Toy().train(), QuantNoiseConfig(noise=noise, p=p, **settings))
