"""The noise functions against float64 computations of their equations."""

import pytest
import torch

from hf_quantnoise import QuantNoiseConfig
from hf_quantnoise.configuration import NOISES
from hf_quantnoise.noise.block_mask import BlockMask, sample_mask

ROWS, COLUMNS = 48, 32
KINDS = ["proxy", "mean", "pq", "int8", "int4", "int1"]


def make(name: str, block_size: int = 8, n_centroids: int = 16):
    config = QuantNoiseConfig(
        noise=name, block_size=block_size, n_centroids=n_centroids, codebook_bits=32
    )
    return NOISES[name](name, config, block_size, n_centroids)


def matrix(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, COLUMNS, generator=generator).to(dtype)


def fitted(name: str, **sizes):
    function = make(name, **sizes)
    function.refresh(matrix(), seed=0)
    return function


def chosen_blocks(function, p: float) -> BlockMask:
    torch.manual_seed(5)
    return sample_mask(ROWS * COLUMNS // function.block_size, p, torch.device("cpu"))


def nearest(function, blocks: torch.Tensor) -> torch.Tensor:
    codebook = function.state["codebook"].double()
    distances = (blocks.double()[:, None] - codebook[None]).square().sum(-1)
    return codebook[distances.argmin(1)]


def rounded(function, weights: torch.Tensor) -> torch.Tensor:
    scale, zero = function.state["scale"].double(), function.state["zero_point"].double()
    levels = 2**function.quantizer.bits - 1
    return ((weights.double() / scale + zero).round().clamp(0, levels) - zero) * scale


EXPECTED = {
    "proxy": lambda function, blocks: torch.zeros_like(blocks).double(),
    "mean": lambda function, blocks: (
        matrix().double().view(-1, function.block_size).mean(0).expand_as(blocks)
    ),
    "pq": nearest,
    "int8": rounded,
    "int4": rounded,
    "int1": rounded,
}


@pytest.mark.parametrize("p", [0.05, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("name", KINDS)
def test_distort_applies_phi_to_chosen_blocks_only(name, p):
    function = fitted(name)
    dense, noisy = matrix(), matrix()
    chosen = chosen_blocks(function, p)
    function.distort(noisy, chosen)
    mask = chosen.as_mask()
    before, after = (m.view(-1, function.block_size) for m in (dense, noisy))
    assert torch.equal(after[~mask], before[~mask])
    expected = EXPECTED[name](function, before)[mask]
    torch.testing.assert_close(after[mask].double(), expected, rtol=1e-5, atol=1e-6)
    assert mask.any()


@pytest.mark.parametrize("name", ["pq", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_distort_at_p_1_equals_quantize(name, dtype):
    function = make(name)
    weight = matrix(dtype=dtype)
    function.refresh(weight, seed=0)
    noisy = weight.clone()
    function.distort(noisy, BlockMask(noisy.numel() // function.block_size))
    assert noisy.dtype == dtype
    assert torch.equal(noisy, function.quantizer.quantize(weight, function.state).to(dtype))


def test_pq_encodes_again_at_p_1_only():
    function = fitted("pq")
    moved = matrix(seed=1)
    full, half = moved.clone(), moved.clone()
    function.distort(full, BlockMask(moved.numel() // 8))
    assert torch.equal(full, function.quantizer.quantize(moved, function.state))
    chosen = chosen_blocks(function, 0.5)
    function.distort(half, chosen)
    kept = function.quantizer.quantize(matrix(), function.state).view(-1, 8)[chosen.as_mask()]
    assert torch.equal(half.view(-1, 8)[chosen.as_mask()], kept)


@pytest.mark.parametrize("p", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("name", KINDS)
def test_distort_of_rows_matches_the_table(name, p):
    function = fitted(name)
    rows = torch.tensor([7, 0, 47, 7, 13, 0])
    chosen = chosen_blocks(function, p)
    table = matrix()
    function.distort(table, chosen)
    some = matrix()[rows]
    function.distort(some, chosen.select_rows(rows, COLUMNS // function.block_size), rows=rows)
    assert torch.equal(some, table[rows])


def test_fixed_point_noise_ignores_block_size():
    function = make("int8", block_size=7)
    assert function.block_size == 1
    assert function.check(5, 9) is None


def test_check_returns_the_reason():
    assert (
        make("proxy", block_size=7).check(10, 32) == "block_size=7 does not divide its 32 columns"
    )
    assert "block_size=7" in make("pq", block_size=7).check(1000, 32)
    assert "16" in make("pq").check(1, 32)
    assert make("pq").check(ROWS, COLUMNS) is None


def test_refresh_follows_the_weights():
    for name in ("mean", "pq", "int8"):
        function = fitted(name)
        before = {key: tensor.clone() for key, tensor in function.state.items()}
        function.refresh(matrix() * 3, seed=0)
        assert any(not torch.equal(before[key], function.state[key]) for key in before)
        another = fitted(name)
        another.refresh(matrix() * 3, seed=0)
        assert all(torch.equal(another.state[key], function.state[key]) for key in before)


def test_refresh_on_the_same_weights_keeps_the_error():
    function = fitted("pq")

    def error() -> float:
        noisy = matrix()
        function.distort(noisy, BlockMask(noisy.numel() // 8))
        return float((noisy - matrix()).square().sum())

    first = error()
    function.refresh(matrix(), seed=1)
    assert error() <= first * (1 + 1e-6)


@pytest.mark.parametrize("name", ["mean", "pq", "int8"])
def test_state_on_a_device_is_not_that_of_another_replica(name, monkeypatch):
    """Replicas of ``nn.DataParallel`` share the noise, and each has its device and thread."""
    function = fitted(name)
    on_cpu = function.state
    # Each write is followed by that of a replica on the CPU.
    replica = property(lambda function: on_cpu, lambda function, state: None)
    monkeypatch.setattr(type(function), "state", replica, raising=False)
    state = function._state_on(torch.device("meta"))
    assert state.keys() == on_cpu.keys() and all(tensor.is_meta for tensor in state.values())
