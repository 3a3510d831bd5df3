"""block_selection="cluster": J consists of the blocks of randomly chosen clusters (table 5)."""

import pytest
import torch
from support.tiny import make_model
from torch import nn

from hf_quantnoise import QuantNoiseConfig, apply_quant_noise
from hf_quantnoise.blocks import weight_matrix
from hf_quantnoise.layer_types import layer_type_of
from hf_quantnoise.noise import find_state

CLUSTERS = 16


def noisy_layer(layer: nn.Module, noise: str = "proxy", p: float = 0.4) -> tuple[nn.Module, dict]:
    """Return the layer with noise in training mode, and the state of its noise."""
    config = QuantNoiseConfig(
        noise=noise,
        p=p,
        block_size=4,
        n_centroids=CLUSTERS,
        block_selection="cluster",
        target_modules="0",
    )
    model = apply_quant_noise(nn.Sequential(layer), config).train()
    ((_, function),) = find_state(model).weights[0].noise.functions
    return layer, function.state


def noised_blocks(layer: nn.Module) -> torch.Tensor:
    noise = layer._layer_noise.weight
    noisy = weight_matrix(layer, noise.noisy_weight(layer.weight, layer_type_of(layer)))
    return (noisy != weight_matrix(layer)).view(-1, 4).any(1)


@pytest.mark.parametrize("noise", ["proxy", "mean", "pq"])
def test_noise_falls_on_complete_clusters(noise):
    torch.manual_seed(0)
    layer, state = noisy_layer(nn.Linear(32, 48), noise)
    codes = state["codes"].reshape(-1)
    seen = set()
    for _ in range(20):
        hit = noised_blocks(layer)
        chosen = codes[hit].unique()
        in_chosen = torch.isin(codes, chosen)
        # With "pq" a cluster of one block is its own centroid, so noise does not change it.
        if noise != "pq":
            assert torch.equal(in_chosen, hit)
        assert not (hit & ~in_chosen).any()
        seen.add(tuple(chosen.tolist()))
    assert len(seen) > 5


def test_each_cluster_is_chosen_at_rate_p():
    torch.manual_seed(0)
    layer, state = noisy_layer(nn.Linear(32, 48), p=0.3)
    codes = state["codes"].reshape(-1)
    rounds = 400
    counts = torch.zeros(CLUSTERS)
    for _ in range(rounds):
        counts[codes[noised_blocks(layer)].unique().long()] += 1
    shares = counts[codes.unique().long()] / rounds
    # Five standard deviations of a binomial share.
    assert (shares - 0.3).abs().max() < 5 * (0.3 * 0.7 / rounds) ** 0.5


def test_lookup_noise_falls_on_complete_clusters():
    torch.manual_seed(0)
    layer, state = noisy_layer(nn.Embedding(60, 32))
    ids = torch.tensor([3, 9, 3, 41])
    rows = layer(ids).detach().view(-1, 4)
    codes = state["codes"][ids].reshape(-1)
    zeroed = (rows == 0).all(1)
    assert zeroed.any() and not zeroed.all()
    assert not torch.isin(codes[~zeroed], codes[zeroed]).any()


def test_tied_weights_share_the_chosen_clusters(input_ids):
    model = make_model("gpt2")
    config = QuantNoiseConfig(
        noise="proxy", p=0.5, block_size=8, n_centroids=8, block_selection="cluster",
        target_modules=["wte", "lm_head"],
    )  # fmt: skip
    apply_quant_noise(model, config).train()
    head, table = model.lm_head, model.transformer.wte
    torch.manual_seed(4)
    rows = table(input_ids).detach()
    basis = torch.eye(32)
    matrix = head(basis).detach().t()  # the head's noisy weight
    torch.testing.assert_close(rows, matrix[input_ids])


def test_invalid_block_selection_raises():
    with pytest.raises(ValueError, match="block_selection='cluster'"):
        QuantNoiseConfig(noise="int8", block_selection="cluster")
    with pytest.raises(ValueError, match=r"block_selection.*'rows'"):
        QuantNoiseConfig(block_selection="rows")
