"""Files and branches of an upload by a trainer, to a local server with the endpoints of the Hub.

Scripts run in separate processes: huggingface_hub reads HF_ENDPOINT once, at import.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.hub_server import hub_environment

HEADER = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parents[1])]!r}
import torch
torch.set_num_threads({torch.get_num_threads()})
from pathlib import Path
from support.tiny import make_model
from support.trainers import make_trainer
from hf_quantnoise import *

folder = Path(sys.argv[1])
ids = torch.arange(5, 320, 7).reshape(3, -1)
rows = [{{"input_ids": row, "labels": label}} for row, label in zip(ids, (0, 1, 1))]
"""
SECRETS = """
trainer = make_trainer(folder, make_model("bert"), rows, hub_model_id="me/secrets")
for name in (".env", "runs/1/.env.local", "runs/1/events.out", "notes.env", "_private/.env"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("HF_TOKEN=hf_secret")
trainer.push_to_hub()
"""
BRANCHES = """
trainer = make_trainer(folder / "by-hand", make_model("bert"), rows, hub_model_id="me/branches")
for revision in ("new", "new", "refs/pr/1", None):
    trainer.push_to_hub(revision=revision)
push_to_hub(make_model("bert"), "me/branches", revision="refs/pr/1")

arguments = {"push_to_hub": True, "hub_model_id": "me/run", "hub_revision": "run"}
trainer = make_trainer(folder / "run", make_model("bert"), rows, **arguments)
trainer.save_model()
arguments = {**arguments, "hub_revision": "saves", "save_strategy": "steps", "save_steps": 1}
trainer = make_trainer(folder / "saves", make_model("bert"), rows, max_steps=1, **arguments)
trainer.train()
"""


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory):
    """Return a function that runs a script and returns its stderr."""

    def run(script, folder):
        done = subprocess.run(
            [sys.executable, "-c", HEADER + script, str(folder)],
            env=hub_environment(hub.url, str(tmp_path_factory.mktemp("cache"))),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    return run


def test_trainer_uploads_no_secrets(hub, run, tmp_path):
    errors = run(SECRETS, tmp_path)
    files = hub.repos["me/secrets"]
    assert {"model.safetensors", "runs/1/events.out", "notes.env"} <= set(files)
    assert not [name for name in files if Path(name).name.startswith(".env")]
    (warning,) = (line for line in errors.splitlines() if ".env" in line)
    assert "'.env', 'runs/1/.env.local'" in warning and "_private" not in warning


def test_trainer_creates_branches(hub, run, tmp_path):
    """With the card of the main branch; ``refs/pr/1`` is a pull request, which exists."""
    card = b"---\nlicense: mit\n---\n# Mine\n"
    hub.repos["me/branches"] = {"README.md": card}
    hub.branches["me/branches", "refs/pr/1"] = {}
    run(BRANCHES, tmp_path)
    new = hub.branches["me/branches", "new"]
    assert "model.safetensors" in new and b"# Mine" in new["README.md"]
    assert "model.safetensors" in hub.branches["me/branches", "refs/pr/1"]
    assert "model.safetensors" in hub.repos["me/branches"]
    # By save_model, and during the training.
    for branch in ("run", "saves"):
        assert "model.safetensors" in hub.branches["me/run", branch], branch
    assert not hub.repos["me/run"]
