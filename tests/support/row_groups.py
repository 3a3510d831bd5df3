"""Noise on the table of a tiny BERT in groups of rows."""

import torch

from hf_quantnoise import (
    IPQConfig,
    QuantNoiseConfig,
    apply_quant_noise,
    count_lookups,
)
from hf_quantnoise.noise import find_state

ROWS, COLUMNS = 320, 32
TARGET = IPQConfig(
    block_size=4, rare_block_size=16, n_centroids=16, frequent_rows=100, leftover_bits=32
)
LEARNED = {"noise": "pq", "p": 1.0, "learn_codebooks": True}


def batch():
    # Word i about 400 / i times, in an order that is not that of the ids.
    weights = 1.0 / (torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)) + 1.0)
    ids = torch.multinomial(weights, 512, True, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids.view(16, 32)}


def noisy(model, target=TARGET, **fields):
    """Return a model with noise that matches a target, and the noise of its table."""
    config = QuantNoiseConfig.matching(target, model, **fields)
    apply_quant_noise(model, config, count_lookups(model, [batch()])).train()
    table = model.get_input_embeddings()
    (weight,) = [w for w in find_state(model).weights if table in w.modules]
    return model, weight.noise.functions[0][1]


NAME = "bert.embeddings.word_embeddings"
