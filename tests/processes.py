"""Programs on several processes of one machine, started as users start them: by ``torchrun`` or
``accelerate launch``."""

import json
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


def torchrun(program: Path, *words: str, processes: int = 2, seconds: int = 600) -> str:
    """Runs a program and gives what it wrote; one process is started without torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [] if processes == 1 else [
        "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1",
    ]  # fmt: skip
    return _run([*launcher, str(program), *words], seconds)


def accelerate_launch(
    folder: Path, program: Path, *words: str, fsdp: dict | None = None, seconds: int = 600
) -> str:
    """Runs a program on two processes as ``accelerate launch`` does with a file that
    ``accelerate config`` could have written, and gives what it wrote.

    Args:
        folder: where that file goes.
        program, words: what is run.
        fsdp: its ``fsdp_config``; None is DDP.
    """
    config = {
        "compute_environment": "LOCAL_MACHINE", "num_machines": 1, "machine_rank": 0,
        # By --cpu, and by MULTI_CPU, accelerate (1.15) starts one process and leaves the rest to
        # mpirun. The program says that it is on CPUs.
        "distributed_type": "MULTI_GPU", "use_cpu": False, "num_processes": 2,
        "mixed_precision": "no", "main_process_port": 0,
    }  # fmt: skip
    if fsdp is not None:
        config |= {"distributed_type": "FSDP", "fsdp_config": fsdp}
    path = folder / "accelerate.json"
    path.write_text(json.dumps(config))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(path)]
    return _run([*launcher, str(program), *words], seconds)


def _run(words: list[str], seconds: int) -> str:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, *words],
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
