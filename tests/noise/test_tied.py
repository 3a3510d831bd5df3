"""All layers that hold one table get one noise."""

import pytest
import torch
from support.zoo import TIED, ZOO, users_of_table
from torch import nn

from hf_quantnoise import QuantNoiseConfig, apply_quant_noise
from hf_quantnoise.noise import find_state


def zeros_used(layer: nn.Module, words: torch.Tensor) -> torch.Tensor:
    """Return which elements (words, features) of the table are zero in a forward of one user."""
    if isinstance(layer, nn.Embedding):
        return layer(words) == 0
    bias = 0 if layer.bias is None else layer.bias
    return (layer(torch.eye(layer.in_features)) - bias).t()[words] == 0


@torch.no_grad()
@pytest.mark.parametrize("name", TIED)
def test_users_of_one_table_see_one_mask_per_forward(name):
    model = ZOO[name].make().train()
    users = users_of_table(model)
    for module in model.modules():  # adding and subtracting a bias leaves rounding errors
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            module.bias.zero_()
    apply_quant_noise(model, QuantNoiseConfig(p=0.5, block_size=4))
    (weight,) = [w for w in find_state(model).weights if users[0] in w.names]
    assert sorted(weight.names) == sorted(users)
    rounds = []
    for words in (torch.arange(40), torch.arange(weight.noise.rows)):  # some, and all
        masks = [zeros_used(model.get_submodule(user), words) for user in users]
        rounds.append(masks)
        assert all(torch.equal(mask, masks[0]) for mask in masks)
        assert 0.4 < masks[0].float().mean() < 0.6
    assert not torch.equal(rounds[0][0], rounds[1][0][:40])
