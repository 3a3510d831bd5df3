"""``push`` to, and ``report`` of, a local server that speaks the Hub's endpoints; in one process of
their own, as huggingface_hub reads HF_ENDPOINT at import."""

import json
import os
import subprocess
import sys

from hub_server import HubServer

from hf_quantnoise.cli import COMMANDS
from hf_quantnoise.cli.checkpoints import Checkpoint
from hf_quantnoise.cli.sizes import report_of

PROGRAM = """
import sys
from hf_quantnoise.cli import main
for line in sys.argv[1:]:
    if main(line.split()[1:]) != 0:
        sys.exit(1)
"""


def test_the_examples_push_what_report_then_reads(made, tmp_path):
    lines = [*COMMANDS["push"].examples, "hf-quantnoise report me/small --json"]
    with HubServer() as hub:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *lines],
            env={
                **os.environ,
                "HF_ENDPOINT": hub.url,
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
                "HF_HOME": str(tmp_path),
                "HF_TOKEN": "hf_local",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "NO_PROXY": "127.0.0.1",
                "no_proxy": "127.0.0.1",
            },
            cwd=made,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    folder = made / "out" / "compressed"
    sent = hub.repos["me/small"]
    for path in folder.iterdir():
        assert sent[path.name] == path.read_bytes()
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
