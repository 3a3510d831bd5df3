"""Two gloo processes: whatever noise is fitted to is rank 0's on every rank."""

import subprocess
import sys

import torch
from processes import needs_gloo

RANK = """
import sys
import torch
import torch.distributed as dist
from torch import nn

from hf_quantnoise import QuantNoiseConfig, apply_quant_noise
from hf_quantnoise.noise import find_state

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(rank)  # other weights on each rank, as after a bad restart: the harder case
model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
config = QuantNoiseConfig(
    noise=["pq", "mean", "int4"], p=0.2, block_size=4, n_centroids=16,
    activation_bits=8, activation_calibration=1,
)
apply_quant_noise(model, config).train()
state = find_state(model)
torch.save(state.state_dict(), f"{folder}/fitted-{rank}")
model(torch.randn(5, 32))
state.refresh_codebooks()
state.refresh_scales()
torch.save(state.state_dict(), f"{folder}/refreshed-{rank}")
torch.save(model.state_dict(), f"{folder}/weights-{rank}")
dist.destroy_process_group()
"""


@needs_gloo
def test_codebooks_scales_and_ranges_are_the_same_on_all_ranks(tmp_path):
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)]) for rank in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    weights = [torch.load(tmp_path / f"weights-{rank}") for rank in (0, 1)]
    assert not torch.equal(weights[0]["0.weight"], weights[1]["0.weight"])
    for moment in ("fitted", "refreshed"):
        one, other = (torch.load(tmp_path / f"{moment}-{rank}") for rank in (0, 1))
        assert one.keys() == other.keys() and len(one) > 10
        for name in one:
            assert torch.equal(one[name], other[name]), (moment, name)
    # The range of activations is that of both ranks' batches together.
    assert float(one["0.input.seen"]) == 1 and float(one["0.input.high"]) > 0
