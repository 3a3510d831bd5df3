"""Programs on several processes of one machine, started as users start them, by ``torchrun`` or
``accelerate launch``; and pieces of programs on two of them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


_ON_A_RANK = """
import datetime, sys
import torch
import torch.distributed as dist

rank, folder, found = int(sys.argv[1]), sys.argv[2], {}
torch.set_num_threads(1)
dist.init_process_group(
    "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
    timeout=datetime.timedelta(seconds=200),
)


def error_of(action, *args):
    try:
        action(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


"""
_AFTERWARDS = """
torch.save(found, f"{folder}/found-{rank}")
dist.barrier()  # gloo calls it an error where the first is gone before the second
dist.destroy_process_group()
"""


def on_two_ranks(source: str, folder: Path, seconds: int = 300) -> list[dict]:
    """Runs a piece of a program on two gloo processes.

    Args:
        source: knows ``rank``, ``folder``, and ``error_of`` (an action and its arguments -> type
            and words of what it raises, or None). What it puts into the dict ``found`` comes back.
        folder: an empty one.

    Returns:
        What each rank found.
    """
    program = folder / "piece.py"
    program.write_text(_ON_A_RANK + source + _AFTERWARDS)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), str(folder)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=seconds)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)[-6000:]
    return [torch.load(folder / f"found-{rank}") for rank in (0, 1)]


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
