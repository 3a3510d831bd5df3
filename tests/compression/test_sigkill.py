"""A process that is killed again and again ends with the model of an uninterrupted one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.trainers import assert_same

PROGRAM = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from datasets import load_from_disk
from safetensors.torch import save_file
from support.trainers import tensors
from test_resume import ARGUMENTS, CONFIG, make_bert_trainer

torch.set_num_threads(1)
folder = Path(sys.argv[2])
trainer = make_bert_trainer(folder / sys.argv[3], load_from_disk(str(folder / "data")))
trainer.compress(CONFIG, ARGUMENTS, resume_from_checkpoint=True)
save_file(tensors(trainer.model), folder / f"{sys.argv[3]}.safetensors")
"""


@pytest.mark.slow
def test_repeated_sigkill(tmp_path, parity_data):
    """A process is killed whenever new files have appeared, until it finishes."""
    parity_data.save_to_disk(str(tmp_path / "data"))
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parent), *sys.path])

    def start(name):
        command = [sys.executable, "-c", PROGRAM, str(here), str(tmp_path), name]
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})

    assert start("straight").wait() == 0
    kills = 0
    for patience in (1, 4, 9, 14, 19, 24, 10**6):
        process, seen = start("killed"), set()
        while process.poll() is None:
            for folder, _, names in os.walk(tmp_path / "killed"):  # folders may be removed
                seen |= {os.path.join(folder, name) for name in names if "safetensors" in name}
            if len(seen) >= patience:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        if process.wait() == 0:
            break
    assert kills >= 3
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("straight", "killed"))
    assert_same(one, other)
