"""The average gradient of a centroid (section 3.2)."""

import pytest
import torch

from hf_quantnoise.quantizers.centroid_gradients import AverageOverBlocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_average_over_more_blocks_than_float16_can_count(dtype):
    codebook = torch.zeros(3, 4, dtype=dtype, requires_grad=True)
    counts = torch.tensor([[70_000], [10], [0]])
    AverageOverBlocks.apply(codebook, counts).backward(torch.full((3, 4), 1000.0, dtype=dtype))
    expected = torch.tensor([1 / 70, 100.0, 1000.0])
    assert codebook.grad.dtype == dtype
    torch.testing.assert_close(codebook.grad[:, 0].float(), expected, rtol=0.01, atol=0)
