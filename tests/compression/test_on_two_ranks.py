"""Two gloo processes: where they resume, and the gradients of replicated parameters."""

import pytest
import torch
from support.processes import needs_gloo, on_two_ranks

PROGRAM = """
import os, shutil

from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_quantnoise.compression.checkpoints import StageCheckpoints
from hf_quantnoise.compression.exact_checkpoints import MEMORY_NAME
from hf_quantnoise.compression.training.fsdp import ShardedCopy
from hf_quantnoise.files.durable import write_list

# ---- each rank has its own disk
files = StageCheckpoints(f"{folder}/disk-{rank}/compression")
NAN = float("nan")

def write(stages, checkpoints):
    shutil.rmtree(files.folder, ignore_errors=True)
    for number in stages:
        os.makedirs(files.folder, exist_ok=True)
        files.save_stage(number, nn.Linear(2, 2), {"history": [{"number": number, "loss": NAN}]})
    for step in checkpoints:
        checkpoint = f"{files.run_folder(3)}/checkpoint-{step}"
        os.makedirs(checkpoint)
        save_file({"step": torch.tensor(step)}, f"{checkpoint}/{MEMORY_NAME}")
        write_list(checkpoint)

def stage_numbers():
    stages = files.stages()
    assert all(stage.folder.startswith(files.folder) for stage in stages)
    return [stage.number for stage in stages]

write([0, 1], [2, 4])
found["same"] = stage_numbers(), files.checkpoint(3)
if rank == 1:
    write([0, 1, 2], [2, 4, 6])
dist.barrier()
found["rank 1 has more"] = error_of(stage_numbers), files.checkpoint(3)
if rank == 1:
    write([0], [2])
dist.barrier()
found["rank 1 has less"] = error_of(stage_numbers), error_of(files.checkpoint, 3)
if rank == 0:
    write([], [])
dist.barrier()
found["rank 0 has none"] = stage_numbers(), files.checkpoint(3)
if rank == 1:  # an incomplete stage on another machine than rank 0's is written again
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
    return on_two_ranks(PROGRAM, tmp_path_factory.mktemp("ranks"))


@needs_gloo
def test_rank_0_decides_where_a_run_resumes(ranks):
    for rank, found in enumerate(ranks):
        stages, checkpoint = found["same"]
        assert stages == [0, 1]
        assert checkpoint.endswith("checkpoint-4")
        assert f"disk-{rank}" in checkpoint
        # Rank 1's machine has removed stage 1 for stage 2, so it cannot resume from there.
        error, checkpoint = found["rank 1 has more"]
        assert error.startswith("ValueError")
        assert "disk-1/compression/stage-1 " in error
        assert "output_dir" in error
        assert checkpoint.endswith("checkpoint-4")
        errors = found["rank 1 has less"]
        for error, folder in zip(errors, ("stage-1", "run-3/checkpoint-4"), strict=True):
            assert f"disk-1/compression/{folder} " in error
        assert found["rank 0 has none"] == ([], None)
    assert ranks[0]["rank 1 has less"] == ranks[1]["rank 1 has less"]
    assert ranks[1]["written again"] == ["files.json", "stage.json", "tensors.safetensors"]


@needs_gloo
def test_gradients_of_replicated_parameters_equal_those_of_ddp(ranks):
    for found in ranks:
        assert found["gradients"] == found["by DDP"]
        assert found["gradients"]["none"] is None
        assert found["gradients"]["second"] == torch.tensor(1.5)
