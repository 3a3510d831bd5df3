"""Runs programs on several processes, by ``torchrun``, ``accelerate launch`` or directly."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


_BEFORE = """
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
_AFTER = """
torch.save(found, f"{folder}/found-{rank}")
"""
_ONE_RANK = str(Path(__file__).with_name("one_rank.py"))


def on_two_ranks(source: str, folder: Path, seconds: int = 300) -> list[dict]:
    """Run a piece of a program on two gloo processes.

    Args:
        source: can use ``rank``, ``folder`` and ``error_of(function, *args)``, which returns type
            and message of the error raised, or None. Puts its results into the dict ``found``.
        folder: an empty folder.
        seconds: timeout.

    Returns:
        ``found`` of each rank.
    """
    program = folder / "piece.py"
    program.write_text(_BEFORE + source + _AFTER)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
    ranks = [
        subprocess.Popen(
            [sys.executable, _ONE_RANK, str(program), str(rank), str(folder)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(outputs)[-6000:]
    return [torch.load(folder / f"found-{rank}") for rank in (0, 1)]


def torchrun(program: Path, *arguments: str, processes: int = 2, seconds: int = 600) -> str:
    """Run a program and return its output; without torchrun if there is one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [] if processes == 1 else [
        "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1", _ONE_RANK,
    ]  # fmt: skip
    return _run([*launcher, str(program), *arguments], seconds)


def accelerate_launch(
    folder: Path, program: Path, *arguments: str, fsdp: dict | None = None, seconds: int = 600
) -> str:
    """Run a program on two processes with ``accelerate launch`` and return its output.

    Args:
        folder: where the config file is written.
        program: the program.
        arguments: its arguments.
        fsdp: ``fsdp_config`` of the config file; None uses DDP.
        seconds: timeout.
    """
    config = {
        "compute_environment": "LOCAL_MACHINE", "num_machines": 1, "machine_rank": 0,
        # With --cpu or MULTI_CPU accelerate (1.15) starts one process and relies on mpirun for the
        # others. The program itself selects the CPU.
        "distributed_type": "MULTI_GPU", "use_cpu": False, "num_processes": 2,
        "mixed_precision": "no", "main_process_port": 0,
    }  # fmt: skip
    if fsdp is not None:
        config |= {"distributed_type": "FSDP", "fsdp_config": fsdp}
    path = folder / "accelerate.json"
    path.write_text(json.dumps(config))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(path)]
    return _run([*launcher, _ONE_RANK, str(program), *arguments], seconds)


def _run(arguments: list[str], seconds: int) -> str:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    with TemporaryDirectory() as folder:
        settings = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "RANK_ERRORS": folder}
        done = subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, **settings, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        errors = sorted(Path(folder).iterdir(), key=lambda file: file.stat().st_mtime)
        by_rank = [f"rank {file.name}: {file.read_text()[-6000:]}" for file in errors]
    message = "\n".join([done.stdout[-2000:], done.stderr[-2000:], "By time:", *by_rank])
    assert done.returncode == 0, message
    return done.stdout


def take_cpus_for_gpus(args) -> None:
    """Make accelerate shard on CPUs, where it would run DDP although FSDP2 supports them.

    Args:
        args: ``TrainingArguments``, before the first trainer is created.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    assert args.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
