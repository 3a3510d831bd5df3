"""``push`` to, and ``report`` of, a local server that speaks the Hub's endpoints; in one process of
their own, as huggingface_hub reads HF_ENDPOINT at import."""

import json
import socket
import subprocess
import sys

import pytest
from support.hub_server import HubServer, hub_environment

from hf_quantnoise.cli import COMMANDS
from hf_quantnoise.cli.checkpoints import Checkpoint
from hf_quantnoise.cli.sizes import report_of
from hf_quantnoise.repository import CARD

PROGRAM = """
import sys
from hf_quantnoise.cli import main
for line in sys.argv[1:]:
    if main(line.split()[1:]) != 0:
        sys.exit(1)
"""


def run_lines(url, home, folder, *lines):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *lines],
        env=hub_environment(url, str(home)),
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_the_examples_push_what_report_then_reads(made, tmp_path):
    lines = [*COMMANDS["push"].examples, "hf-quantnoise report me/small --json"]
    with HubServer() as hub:
        done = run_lines(hub.url, tmp_path, made, *lines)
        assert done.returncode == 0, done.stderr[-3000:]
    folder = made / "out" / "compressed"
    sent = hub.repos["me/small"]
    for path in folder.iterdir():
        if path.name != CARD:
            assert sent[path.name] == path.read_bytes()
    # Saved before it had a repository: the card that went out names it, the one here is as it was.
    here, there = (folder / CARD).read_text(), sent[CARD].decode()
    assert 'from_pretrained("this/repository")' in here and "this/repository" not in there
    assert there == here.replace("this/repository", "me/small")
    asked = [path for method, path in hub.requests if method == "POST"]
    assert "/api/models/me/small/commit/main" in asked
    assert "/api/models/me/small/branch/ipq-8" in asked
    assert "/api/models/me/small/commit/ipq-8" in asked
    _, _, out = done.stdout.partition("{")
    told = json.loads("{" + out)
    report, _ = report_of(Checkpoint(str(folder)))
    assert told["note"] is None
    assert told["total"]["disk_bytes"] == report.total.disk_bytes
    assert len(told["rows"]) == len(report.rows)
    # Only the beginning of the weights was asked for, and they are in no cache.
    assert not list(tmp_path.rglob("model.safetensors"))


def test_a_folder_whose_files_are_others_is_refused(work, run):
    config = work / "out" / "compressed" / "config.json"
    values = json.loads(config.read_text())
    values["quantization_config"]["plan"].popitem()
    config.write_text(json.dumps(values))
    code, _, err = run("push out/compressed me/small")
    assert code == 1 and "the files are not those of its config.json" in err


@pytest.fixture
def closed():
    """An address on the loopback at which nobody listens: a port taken, and not listened at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_a_hub_that_is_not_there_is_named(closed, made, tmp_path):
    done = run_lines(closed, tmp_path, made, "hf-quantnoise push out/compressed me/small")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    for words in ("error: 'me/small'", closed, "refused", "HF_ENDPOINT"):
        assert words in done.stderr


def test_a_hub_that_refuses_is_named(made, tmp_path):
    with HubServer(refuses=True) as hub:
        done = run_lines(hub.url, tmp_path, made, "hf-quantnoise push out/compressed me/small")
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        for words in ("error: 'me/small'", f"to {hub.url}:", "403", "hf auth login"):
            assert words in done.stderr
        assert not hub.repos


def test_what_a_repository_holds_is_reported_without_a_config(made, tmp_path):
    """An adapter's one file; and a repository with nothing to count."""
    file = made / "out" / "dense" / "model.safetensors"
    with HubServer() as hub:
        hub.repos["me/adapter"] = {"adapter_model.safetensors": file.read_bytes()}
        hub.repos["me/words"] = {"README.md": b"no model"}
        lines = [f"hf-quantnoise report {name} --json" for name in ("me/adapter", "me/words")]
        done = run_lines(hub.url, tmp_path, made, *lines)
    told = json.loads(done.stdout)
    assert told["total"]["disk_bytes"] == file.stat().st_size
    assert "'me/adapter' holds no config.json" in told["note"]
    assert done.returncode == 1
    assert "'me/words' holds no config.json and no *.safetensors" in done.stderr
