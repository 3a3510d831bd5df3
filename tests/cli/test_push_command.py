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


def run_lines(url, home, folder, *lines, token=True):
    environment = hub_environment(url, str(home))
    if not token:
        del environment["HF_TOKEN"]
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *lines],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )


def outputs(text: str) -> list[dict]:
    """Return the JSON documents in the output of several commands."""
    decoder, found = json.JSONDecoder(), []
    while (begin := text.find("{")) >= 0:
        document, end = decoder.raw_decode(text, begin)
        found.append(document)
        text = text[end:]
    return found


@pytest.fixture(scope="module")
def session(made, tmp_path_factory):
    """Push a model, report it, an adapter and a repository without a model; in one process."""
    home = tmp_path_factory.mktemp("home")
    weights = (made / "out" / "dense" / "model.safetensors").read_bytes()
    names = ("me/small", "me/adapter", "me/words")
    reports = [f"hf-quantnoise report {name} --json" for name in names]
    with HubServer() as hub:
        hub.repos["me/adapter"] = {"adapter_model.safetensors": weights}
        hub.repos["me/words"] = {"README.md": b"not a model"}
        hub.repos["me/small"] = {
            "model-00001-of-00002.safetensors": b"of an older model",
            "model.safetensors.index.json": b"of an older model",
            "notes.txt": b"mine",
        }
        done = run_lines(hub.url, home, made, *COMMANDS["push"].examples, *reports)
    # Only the beginning of the weights was requested, and they are not cached.
    assert not list(home.rglob("model.safetensors"))
    return hub, done


def test_push_uploads_the_files_and_names_the_repository(session, made):
    hub, _ = session
    folder, sent = made / "out" / "compressed", hub.repos["me/small"]
    for path in folder.iterdir():
        if path.name != CARD:
            assert sent[path.name] == path.read_bytes()
    # The uploaded card names the repository, the local one is unchanged.
    local, uploaded = (folder / CARD).read_text(), sent[CARD].decode()
    assert 'model="this/repository")' in local and "this/repository" not in uploaded
    assert uploaded == local.replace("this/repository", "me/small")
    assert "notes.txt" in sent and not any("-of-" in name or "index" in name for name in sent)
    requested = [path for method, path in hub.requests if method == "POST"]
    assert "/api/models/me/small/commit/main" in requested
    assert "/api/models/me/small/branch/ipq-8" in requested
    assert "/api/models/me/small/commit/ipq-8" in requested


def test_report_reads_repositories(session, made):
    """A packed model, the file of an adapter, and a repository without a model."""
    _, done = session
    packed, adapter = outputs(done.stdout)
    report, _ = report_of(Checkpoint(str(made / "out" / "compressed")))
    assert packed["note"] is None
    assert packed["total"]["disk_bytes"] == report.total.disk_bytes
    assert len(packed["rows"]) == len(report.rows)
    size = (made / "out" / "dense" / "model.safetensors").stat().st_size
    assert adapter["total"]["disk_bytes"] == size
    assert "'me/adapter' has no config.json" in adapter["note"]
    assert done.returncode == 1
    assert "'me/words' has no config.json and no *.safetensors" in done.stderr


def test_push_uploads_no_secrets(work, tmp_path):
    folder = work / "out" / "compressed"
    for name in (".env", "notes/.env.local", "notes/.envrc", "notes/env.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("HF_TOKEN=hf_secret")
    with HubServer() as hub:
        done = run_lines(hub.url, tmp_path, work, "hf-quantnoise push out/compressed me/small")
    assert done.returncode == 0, done.stderr
    files = hub.repos["me/small"]
    assert "notes/env.txt" in files and not [name for name in files if ".env" in name]
    (warning,) = (line for line in done.stderr.splitlines() if ".env" in line)
    assert "'.env', 'notes/.env.local', 'notes/.envrc'" in warning


def test_folders_that_do_not_match_their_config_are_refused(work, run):
    config = work / "out" / "compressed" / "config.json"
    values = json.loads(config.read_text())
    values["quantization_config"]["plan"].popitem()
    config.write_text(json.dumps(values))
    code, _, err = run("push out/compressed me/small")
    assert code == 1 and "invalid plan in quantization_config: it has no entry for" in err


@pytest.mark.parametrize("name", ["a/b/c", "me/a--b", "https://huggingface.co/me/x"])
def test_invalid_names_are_refused_before_the_hub_is_asked(made, run, name):
    code, _, err = run(f"push {made}/out/compressed {name}")
    assert code == 1 and f"invalid repo_id='{name}'" in err and "network" not in err


@pytest.mark.parametrize("content", [b"---\nlicense: [mit\n---\n", b"caf\xe9"])
def test_invalid_cards_are_refused_before_the_hub_is_asked(work, run, content):
    (work / "out" / "compressed" / CARD).write_bytes(content)
    code, _, err = run("push out/compressed me/small")
    assert code == 1 and "invalid model card 'out/compressed/README.md'" in err
    assert "network" not in err


def test_card_that_the_hub_refuses_leaves_no_repository(work, tmp_path):
    (work / "out" / "compressed" / CARD).write_text("---\nlicense: my own\n---\n")
    with HubServer() as hub:
        done = run_lines(hub.url, tmp_path, work, "hf-quantnoise push out/compressed me/small")
        assert not hub.repos
        assert hub.validated == ["Bearer hf_local"]
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    for words in (
        "'out/compressed/README.md'",
        '"license" with value "my own" is not valid',
        "correct the lines",
    ):
        assert words in done.stderr


def test_invalid_branch_is_named(made, tmp_path):
    line = "hf-quantnoise push out/compressed me/small --revision a..b"
    with HubServer() as hub:
        done = run_lines(hub.url, tmp_path, made, line)
    assert done.returncode == 1 and "Invalid rev id" in done.stderr, done.stderr
    assert "--revision" in done.stderr and "network" not in done.stderr


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


def test_push_without_a_token_names_the_remedy(made, tmp_path):
    line = "hf-quantnoise push out/compressed me/small"
    with HubServer() as hub:
        done = run_lines(hub.url, tmp_path, made, line, token=False)
        assert not hub.repos
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        f"hf-quantnoise push: error: 'me/small' cannot be pushed to {hub.url} without a token; log "
        "in with `hf auth login`, or set HF_TOKEN\n"
    )
