"""Files, branches and cards of uploads to a local server with the endpoints of the Hub.

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
REFUSED = """
class Broken(type(make_model("bert"))):
    def save_pretrained(self, *args, **kwargs):
        raise OSError("disk full")

model = make_model("bert")
for repo, model, card, kind, text in (
    ("me/invalid", model, QuantNoiseCard(base_model="a b"), ValueError, "base_model"),
    ("invalid", model, QuantNoiseCard(base_model="a b"), ValueError, "base_model"),
    ("me/broken", Broken(model.config), None, OSError, "disk full"),
):
    try:
        push_to_hub(model, repo, card=card, token="hf_other")
    except kind as error:
        assert text in str(error), error
        print(error, file=sys.stderr)
    else:
        raise AssertionError(repo)
"""
MERGED = """
model = quantize_model(make_model("bert"), IPQConfig(n_centroids=16), progress=False)
push_to_hub(model, "written")
push_to_hub(model, "me/written", revision="new")
push_to_hub(model, "created", token="hf_other")
"""
NO_TOKEN = """
import os
del os.environ["HF_TOKEN"]
for repo in ("me/nothing", "nothing"):
    try:
        push_to_hub(make_model("bert"), repo)
    except PermissionError as error:
        assert f"{repo!r} cannot be pushed" in str(error) and "hf auth login" in str(error), error
    else:
        raise AssertionError(repo)
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


def test_push_that_fails_creates_no_repository(hub, run, tmp_path):
    """The card is checked with the token, and before anything is created."""
    before = set(hub.repos)
    hub.validated.clear()
    errors = run(REFUSED, tmp_path)
    assert set(hub.repos) == before
    assert hub.validated == ["Bearer hf_other"] * 2
    assert "invalid model card of 'me/invalid': " in errors
    assert '"base_model" with value "a b" is not valid' in errors


def test_push_keeps_cards_of_repositories_without_an_owner(hub, run, tmp_path):
    hub.repos["me/written"] = {"README.md": b"---\nlicense: mit\n---\n# Mine\n"}
    run(MERGED, tmp_path)
    for files in (hub.repos["me/written"], hub.branches["me/written", "new"]):
        assert b"# Mine" in files["README.md"] and b"license: mit" in files["README.md"]
        assert b'from_pretrained("me/written")' in files["README.md"]
    assert b'from_pretrained("me/created")' in hub.repos["me/created"]["README.md"]


def test_push_without_a_token_names_the_remedy(hub, run, tmp_path):
    before = set(hub.repos)
    run(NO_TOKEN, tmp_path)
    assert set(hub.repos) == before
