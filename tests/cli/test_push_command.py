"""``push`` and ``report`` with a local server that has the endpoints of the Hub.

They run in a subprocess, as huggingface_hub reads HF_ENDPOINT when it is imported.
"""

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


def test_report_reads_pushed_models(made, tmp_path):
    lines = [*COMMANDS["push"].examples, "hf-quantnoise report me/small --json"]
    with HubServer() as hub:
        done = run_lines(hub.url, tmp_path, made, *lines)
        assert done.returncode == 0, done.stderr[-3000:]
    folder = made / "out" / "compressed"
    sent = hub.repos["me/small"]
    for path in folder.iterdir():
        if path.name != CARD:
            assert sent[path.name] == path.read_bytes()
    # The uploaded card names the repository, the local one is unchanged.
    local, uploaded = (folder / CARD).read_text(), sent[CARD].decode()
    assert 'from_pretrained("this/repository")' in local and "this/repository" not in uploaded
    assert uploaded == local.replace("this/repository", "me/small")
    requested = [path for method, path in hub.requests if method == "POST"]
    assert "/api/models/me/small/commit/main" in requested
    assert "/api/models/me/small/branch/ipq-8" in requested
    assert "/api/models/me/small/commit/ipq-8" in requested
    _, _, out = done.stdout.partition("{")
    shown = json.loads("{" + out)
    report, _ = report_of(Checkpoint(str(folder)))
    assert shown["note"] is None
    assert shown["total"]["disk_bytes"] == report.total.disk_bytes
    assert len(shown["rows"]) == len(report.rows)
    # Only the beginning of the weights was requested, and they are not cached.
    assert not list(tmp_path.rglob("model.safetensors"))


def test_folders_that_do_not_match_their_config_are_refused(work, run):
    config = work / "out" / "compressed" / "config.json"
    values = json.loads(config.read_text())
    values["quantization_config"]["plan"].popitem()
    config.write_text(json.dumps(values))
    code, _, err = run("push out/compressed me/small")
    assert code == 1 and "the files do not match config.json" in err


@pytest.fixture
def closed():
    """A local address without a server: a port that is bound, without listening."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_unreachable_hub_is_named(closed, made, tmp_path):
    done = run_lines(closed, tmp_path, made, "hf-quantnoise push out/compressed me/small")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    for words in ("error: 'me/small'", closed, "refused", "HF_ENDPOINT"):
        assert words in done.stderr


def test_refusing_hub_is_named(made, tmp_path):
    with HubServer(refuses=True) as hub:
        done = run_lines(hub.url, tmp_path, made, "hf-quantnoise push out/compressed me/small")
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        for words in ("error: 'me/small'", f"to {hub.url}:", "403", "hf auth login"):
            assert words in done.stderr
        assert not hub.repos


def test_report_of_repositories_without_config(made, tmp_path):
    """The file of an adapter, and a repository without a model."""
    file = made / "out" / "dense" / "model.safetensors"
    with HubServer() as hub:
        hub.repos["me/adapter"] = {"adapter_model.safetensors": file.read_bytes()}
        hub.repos["me/words"] = {"README.md": b"not a model"}
        lines = [f"hf-quantnoise report {name} --json" for name in ("me/adapter", "me/words")]
        done = run_lines(hub.url, tmp_path, made, *lines)
    shown = json.loads(done.stdout)
    assert shown["total"]["disk_bytes"] == file.stat().st_size
    assert "'me/adapter' has no config.json" in shown["note"]
    assert done.returncode == 1
    assert "'me/words' has no config.json and no *.safetensors" in done.stderr
