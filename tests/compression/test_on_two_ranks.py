"""Two gloo processes and parts of the pass: where it goes on, gradients, what all refuse."""

import pytest
import torch
from support.processes import needs_gloo, on_two_ranks

PIECE = """
import os, shutil

from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_quantnoise.compression.checkpoints import MEMORY_NAME, StageCheckpoints
from hf_quantnoise.compression.training.fsdp import ShardedCopy

# ---- each rank has a folder of its own
files = StageCheckpoints(f"{folder}/disk-{rank}/compression")
NAN = float("nan")

def leave(stages, checkpoints):
    shutil.rmtree(files.folder, ignore_errors=True)
    for number in stages:
        os.makedirs(files.folder, exist_ok=True)
        files.save_stage(number, nn.Linear(2, 2), {"history": [{"number": number, "loss": NAN}]})
    for step in checkpoints:
        place = f"{files.run_folder(3)}/checkpoint-{step}"
        os.makedirs(place)
        save_file({"step": torch.tensor(step)}, f"{place}/{MEMORY_NAME}")

def goes_on():
    stages = files.stages()
    assert all(stage.folder.startswith(files.folder) for stage in stages)
    return [stage.number for stage in stages]

leave([0, 1], [2, 4])
found["same"] = goes_on(), files.checkpoint(3)
if rank == 1:
    leave([0, 1, 2], [2, 4, 6])
dist.barrier()
found["second has more"] = error_of(goes_on), files.checkpoint(3)
if rank == 1:
    leave([0], [2])
dist.barrier()
found["second has less"] = error_of(goes_on), error_of(files.checkpoint, 3)
if rank == 0:
    leave([], [])
dist.barrier()
found["first has none"] = goes_on(), files.checkpoint(3)
if rank == 1:  # what is torn on another machine than rank 0's does not stop its next stage
    os.unlink(f"{files.folder}/stage-0/tensors.safetensors")
    files.save_stage(0, nn.Linear(2, 2), {"history": []})
    found["written again"] = sorted(os.listdir(f"{files.folder}/stage-0"))

# ---- gradients
class Scalars(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("both", "second", "none"):
            setattr(self, name, nn.Parameter(torch.ones(())))

    def forward(self, x):
        return x * self.both * (self.second if rank == 1 else 1.0)

inputs = torch.tensor(2.0 + rank)
copy = ShardedCopy(Scalars(), torch.device("cpu"))
copy.model(inputs).backward()
copy.average_gradients()
found["gradients"] = {name: p.grad for name, p in copy.model.named_parameters()}
wrapped = DistributedDataParallel(Scalars(), find_unused_parameters=True)
wrapped(inputs).backward()
found["by DDP"] = {name: p.grad for name, p in wrapped.module.named_parameters()}
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks(PIECE, tmp_path_factory.mktemp("ranks"))


@needs_gloo
def test_a_pass_goes_on_where_rank_0_says(ranks):
    for rank, found in enumerate(ranks):
        stages, checkpoint = found["same"]
        assert stages == [0, 1]
        assert checkpoint.endswith("checkpoint-4") and f"disk-{rank}" in checkpoint
        # Rank 1's machine has dropped stage 1 for stage 2: it cannot go on from there.
        error, checkpoint = found["second has more"]
        assert "ValueError" in error and "output_dir must be a folder" in error
        assert "disk-1/compression/stage-1 what" in error
        assert checkpoint.endswith("checkpoint-4")
        errors = found["second has less"]
        for error, place in zip(errors, ("stage-1", "run-3/checkpoint-4"), strict=True):
            assert f"disk-1/compression/{place} what" in error
        assert found["first has none"] == ([], None)
    assert ranks[0]["second has less"] == ranks[1]["second has less"]
    assert ranks[1]["written again"] == ["stage.json", "tensors.safetensors"]


@needs_gloo
def test_gradients_are_those_of_ddp_and_none_where_no_rank_has_one(ranks):
    for found in ranks:
        assert found["gradients"] == found["by DDP"]
        assert found["gradients"]["none"] is None
        assert found["gradients"]["second"] == torch.tensor(1.5)
