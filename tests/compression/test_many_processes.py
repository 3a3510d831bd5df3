"""Noise and pass on two gloo processes: one model, and the one a single process makes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

PROGRAM = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])

import torch
from datasets import load_from_disk
from safetensors.torch import save_file
from stacked import make_stacked
from transformers import TrainingArguments

from hf_quantnoise import CompressionArguments, IPQConfig, QuantNoiseConfig, QuantNoiseTrainer
from hf_quantnoise.compression.pass_files import tensors_in_memory
from hf_quantnoise.hub import packer
from hf_quantnoise.noise import find_state

torch.set_num_threads(1)
folder, name, options = Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
arguments = {
    "output_dir": str(folder / name), "per_device_train_batch_size": 16 // world,
    "learning_rate": 1e-3, "report_to": "none", "save_strategy": "steps", "save_steps": 2,
    "disable_tqdm": True, "use_cpu": True, "num_train_epochs": 1, "ddp_backend": "gloo",
    "optim": "sgd", **options.get("arguments", {}),
}
if world == 1:
    del arguments["ddp_backend"]
data = load_from_disk(str(folder / "data"))
model = make_stacked("bert", 3)
noise = QuantNoiseConfig(**options["noise"])
trainer = QuantNoiseTrainer(
    model, TrainingArguments(**arguments), noise, train_dataset=data, eval_dataset=data
)
clustered = []
real = packer.pack_layer
packer.pack_layer = lambda *args, **kwargs: clustered.append(None) or real(*args, **kwargs)
trainer.evaluate()  # accelerate would leave DDP out of what follows
trainer.train()
fitted = find_state(model).state_dict()
save_file({k: v.contiguous() for k, v in fitted.items()}, folder / f"{name}-{rank}-noise")
config = IPQConfig(block_size=4, n_centroids=16, **options.get("config", {}))
small = trainer.compress(config, CompressionArguments(**options.get("stages", {})))
tensors = {k: v.clone() for k, v in tensors_in_memory(small).items()}
save_file(tensors, folder / f"{name}-{rank}-model")
errors = {k: v for r in trainer.compression_history for k, v in r["layer_errors"].items()}
assert abs(len(clustered) - len(errors) / world) < 2, (len(clustered), len(errors), world)
(folder / f"{name}-{rank}-errors").write_text(json.dumps(errors))
losses = [record["metric"]["eval_loss"] for record in trainer.compression_history]
(folder / f"{name}-{rank}-losses").write_text(json.dumps(losses))
"""

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


@pytest.fixture
def run(tmp_path, parity_data):
    parity_data.save_to_disk(str(tmp_path / "data"))
    tests = str(Path(__file__).parents[1])

    def start(name: str, world: int, **options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [sys.executable, "-c", PROGRAM, tests, str(tmp_path), name, json.dumps(options)]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        common |= {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
        processes = []
        for rank in range(world):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **common} if world > 1 else {}
            own = {**os.environ, "PYTHONPATH": common["PYTHONPATH"], **own}
            processes.append(subprocess.Popen(words, env=own))
        assert [process.wait(timeout=300) for process in processes] == [0] * world
        return [
            {
                "noise": load_file(tmp_path / f"{name}-{rank}-noise"),
                "model": load_file(tmp_path / f"{name}-{rank}-model"),
                "errors": json.loads((tmp_path / f"{name}-{rank}-errors").read_text()),
                "losses": json.loads((tmp_path / f"{name}-{rank}-losses").read_text()),
            }
            for rank in range(world)
        ]

    return start


@needs_gloo
def test_two_processes_hold_one_model_and_it_is_that_of_a_single_one(run):
    # int8 noise at p = 1 draws nothing, so both ways see the same weights.
    options = {"noise": {"noise": "int8", "p": 1.0}, "stages": {"stage_schedule": "continue"}}
    (single,) = run("single", 1, **options)
    one, other = run("two", 2, **options)
    for part in ("noise", "model"):
        assert one[part].keys() == other[part].keys() == single[part].keys()
        for name, tensor in one[part].items():
            assert torch.equal(tensor, other[part][name]), name
            if not name.endswith("indices"):
                torch.testing.assert_close(tensor, single[part][name], rtol=1e-3, atol=1e-5)
    # Each rank clustered half of the weights, and both know all errors.
    assert one["errors"] == other["errors"]
    assert one["errors"] == pytest.approx(single["errors"], rel=1e-3)
    assert min(one["errors"].values()) > 0
    assert one["losses"] == other["losses"]
    assert one["losses"] == pytest.approx(single["losses"], rel=1e-4)


@needs_gloo
def test_exact_noise_layerdrop_and_small_centroids_are_equal_on_both_ranks(run):
    options = {
        "noise": {"noise": "pq", "p": 0.2, "block_size": 4, "n_centroids": 16, "layerdrop": 0.3,
                  "codebook_update": 2, "share_layers": 2},
        "config": {"codebook_bits": 8, "activation_bits": 8},
        "arguments": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True,
                      "bf16": True},
    }  # fmt: skip
    one, other = run("two", 2, **options)
    for part in ("noise", "model"):
        for name, tensor in one[part].items():
            assert torch.equal(tensor, other[part][name]), name
    assert one["losses"] == other["losses"]
