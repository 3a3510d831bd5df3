"""Programs on several processes of one machine, started as users start them: by ``torchrun``."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


def torchrun(program: Path, *words: str, processes: int = 2, seconds: int = 300) -> str:
    """Runs a program and gives what it wrote; one process is started without torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [] if processes == 1 else [
        "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1",
    ]  # fmt: skip
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, *launcher, str(program), *words],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def take_cpus_for_gpus(args) -> None:
    """Lets accelerate shard on CPUs, where it would run DDP: FSDP2 itself takes them as well.

    Args:
        args: ``TrainingArguments``; before the first trainer is made.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    assert args.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
