"""Weights through the large files of a local Hub: upload, interrupted download, refused requests.

Scripts run in separate processes: huggingface_hub reads HF_ENDPOINT once, at import.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from support.hub_metadata import metadata_problems
from support.hub_server import hub_environment

# A pretrained model of 1 MB, for those who have it; the others push a random one.
STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"
GENERATOR = str(STORIES) if STORIES.is_dir() else ""
HEADER = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parents[1])]!r}
import json, torch
torch.set_num_threads({torch.get_num_threads()})
folder = sys.argv[1]
ids = torch.arange(5, 320, 7).reshape(3, -1)

import os, huggingface_hub.repocard
if huggingface_hub.__version__.startswith("1."):  # sends cards to a fixed address to check them
    class Session:
        new = staticmethod(huggingface_hub.repocard.get_session)
        def post(self, url, **kwargs):
            url = url.replace("https://huggingface.co", os.environ["HF_ENDPOINT"])
            return self.new().post(url, **kwargs)
    huggingface_hub.repocard.get_session = Session
"""
PUSH = f"""
from support.tiny import make_model, make_vision_model
from support.words import words
from hf_quantnoise import *
from transformers import AutoModelForCausalLM, AutoTokenizer, ViTImageProcessorPil

def compress(name, model, processing, inputs, **kwargs):
    model = quantize_model(model, IPQConfig(n_centroids=16, block_size=4), progress=False)
    with torch.no_grad():
        torch.save((inputs, model(inputs).logits), folder + "/" + name)
    push_to_hub(model, "me/" + name, processing_class=processing, **kwargs)
    return model

text = words()
card = QuantNoiseCard(
    base_model="google-bert/bert-base-uncased", dataset="GLUE SST-2", dataset_id="nyu-mll/glue",
    dataset_config="sst2", dataset_split="validation", after={{"eval_accuracy": 0.75}},
)
compress("classifier", make_model("bert"), text, ids, card=card)
model = compress("shards", make_model("bert"), text, ids, max_shard_size="8KB")
model.save_pretrained(folder + "/invalid")
with open(folder + "/invalid/README.md", "w") as file:
    file.write("---\\nlicense: my own\\n---\\n")
images = ViTImageProcessorPil(size={{"height": 32, "width": 32}})
compress("images", make_vision_model("resnet"), images, torch.randn(2, 3, 32, 32))
if {GENERATOR!r}:
    generator = AutoModelForCausalLM.from_pretrained({GENERATOR!r})
    text = AutoTokenizer.from_pretrained({GENERATOR!r})
else:
    generator = make_model("gpt2")
compress("generator", generator, text, ids)
"""
# The code of a card, then the logits of the model that it loaded.
RUN_SNIPPET = """
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1024  # small files have several, too
assert "hf_quantnoise" not in sys.modules
name = sys.argv[2]
code = open(folder + "/" + name + ".py").read()
exec(code)
inputs, expected = torch.load(folder + "/" + name)
with torch.no_grad():
    assert torch.equal(pipe.model(inputs).logits, expected)
"""
COMMANDS = {
    "gated": "report me/gated",
    "gated, weights": "convert me/gated out/dense --to dense",
    "missing": "report me/nowhere",
    "missing, compress": "compress me/nowhere out/small",
    "missing revision": "report me/classifier --revision nowhere",
    "invalid card": "push invalid me/invalid",
    "gated, finetune": "finetune glue --model_name_or_path me/gated --train_file a.csv "
    "--validation_file a.csv --output_dir out",
}
REFUSED = f"""
import contextlib, io
from huggingface_hub import ModelCard
from hf_quantnoise import AutoQuantizedModel, IPQConfig
from hf_quantnoise.cli import main
found = {{}}
for name, line in {COMMANDS!r}.items():
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            code = main(line.split())
        except SystemExit as stop:
            code = stop.code
    found[name] = (code, errors.getvalue())
calls = {{
    "load gated": lambda: AutoQuantizedModel.from_pretrained("me/gated"),
    "load missing": lambda: AutoQuantizedModel.from_pretrained("me/nowhere"),
    "load revision": lambda: AutoQuantizedModel.from_pretrained("me/small", revision="nowhere"),
    "load subfolder": lambda: AutoQuantizedModel.from_pretrained("me/shards", subfolder="no"),
    "load shards": lambda: AutoQuantizedModel.from_pretrained("me/shards"),
    "config gated": lambda: IPQConfig.from_pretrained("me/gated"),
    "validate": ModelCard("---\\nlicense: my own\\n---\\n").validate,
}}
for name, call in calls.items():
    try:
        call()
    except (OSError, ValueError) as error:
        found[name] = (type(error).__name__, str(error))
# The download of a shard has been refused: the files before it need not be downloaded again.
inputs, expected = torch.load(folder + "/shards")
with torch.no_grad():
    assert torch.equal(AutoQuantizedModel.from_pretrained("me/shards")(inputs).logits, expected)
for repo in ("classifier", "generator", "images"):
    ModelCard.load("me/" + repo).validate()
with open(folder + "/found.json", "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory):
    """Return a function that runs a script with an empty cache."""

    def run(script, folder, *arguments):
        return subprocess.run(
            [sys.executable, "-c", HEADER + script, str(folder), *arguments],
            env=hub_environment(hub.url, str(tmp_path_factory.mktemp("cache"))),
            cwd=folder,
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture(scope="module")
def pushed(hub, run, tmp_path_factory):
    """Return a folder with the inputs and logits of the pushed models."""
    folder = tmp_path_factory.mktemp("pushed")
    base = b"---\nlicense: apache-2.0\nlanguage: en\n---\n"
    hub.repos["google-bert/bert-base-uncased"] = {"README.md": base}
    done = run(PUSH, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def weights(hub, repo):
    """Return the names of a repository's weight files, by the hash of their content."""
    stored = hub.storage.objects.items()
    files = {
        oid: [n for n, data in hub.repos[repo].items() if data == each] for oid, each in stored
    }
    return {oid: names[0] for oid, names in files.items() if names}


def snippet(hub, repo):
    text = ModelCard(hub.repos[repo]["README.md"].decode()).text
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


def test_push_uploads_weights_as_large_files(hub, pushed):
    """The server takes no weights with the commit, and only complete objects without a token."""
    posts = [path for method, path in hub.requests if method == "POST"]
    for repo in ("classifier", "generator", "images"):
        assert list(weights(hub, f"me/{repo}").values()) == ["model.safetensors"]
        paths = (f"/me/{repo}.git/info/lfs/objects/batch", f"/api/models/me/{repo}/commit/main")
        assert posts.index(paths[0]) < posts.index(paths[1])
    assert len(weights(hub, "me/shards")) > 1
    assert posts.count("/lfs/verify") == len(hub.storage.objects)
    assert "/api/validate-yaml" in posts


@pytest.mark.parametrize("name", ["classifier", "generator", "images"])
def test_snippet_of_card_runs_as_pasted(name, hub, run, pushed):
    """In a new process that has imported nothing; the first download of weights is interrupted."""
    code = snippet(hub, f"me/{name}")
    assert code.startswith("import hf_quantnoise")
    (pushed / f"{name}.py").write_text(code)
    (oid,) = weights(hub, f"me/{name}")
    size = len(hub.storage.objects[oid])
    hub.storage.cut = 5000
    done = run(RUN_SNIPPET, pushed, name)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "generated_text" in done.stdout if name == "generator" else "score" in done.stdout
    # The client reads in pieces of 1024 bytes and continues after the last complete one.
    found = [(wanted, sent) for each, wanted, sent in hub.storage.sent if each == oid]
    assert found == [(None, 5000), ("bytes=4096-", size - 4096)]


@pytest.fixture(scope="module")
def refused(hub, run, pushed):
    """Return the errors of commands and calls that the Hub refuses."""
    hub.repos["me/gated"], hub.repos["me/small"] = {**hub.repos["me/classifier"]}, {}
    hub.gated.add("me/gated")
    shards = weights(hub, "me/shards")
    *_, hub.storage.refused = sorted(shards, key=shards.get)
    done = run(REFUSED, pushed)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((pushed / "found.json").read_text())


@pytest.mark.parametrize("name", COMMANDS)
def test_refused_commands_print_one_line(name, refused):
    code, text = refused[name]
    assert code in (1, 2)
    assert "Traceback" not in text and text.strip().splitlines()[-1].count("error: ") == 1
    if name == "invalid card":
        assert '"license" with value "my own" is not valid' in text
        assert "correct the lines at the top of README.md" in text
        return
    kind = "gated" if "gated" in name else "no such branch" if "revision" in name else "not exist"
    assert kind in text, text
    assert ("check the revision" if "revision" in name else "hf auth login") in text


def test_refused_calls_name_the_reason(refused):
    kind, text = refused["load gated"]
    assert kind == "OSError" and "'me/gated'" in text and "request access" in text
    assert (
        "'me/nowhere'" in refused["load missing"][1] and "not exist" in refused["load missing"][1]
    )
    assert "no such branch" in refused["load revision"][1]
    assert "repository 'me/shards' has no no/config.json" in refused["load subfolder"][1]
    assert "403" in refused["load shards"][1]
    assert refused["config gated"][0] == "PermissionError"
    assert "request access" in refused["config gated"][1]


def test_files_of_an_incomplete_download_are_used(hub, refused):
    shards = weights(hub, "me/shards")
    assert sorted(oid for oid, _, _ in hub.storage.sent if oid in shards) == sorted(shards)


def test_cards_pass_the_metadata_checks(hub, refused):
    """Of ``ModelCard.validate`` (in the process of ``refused``) and of every push."""
    kind, text = refused["validate"]
    assert kind == "ValueError" and '"license" with value "my own"' in text
    for repo in ("classifier", "generator", "images", "shards"):
        assert metadata_problems(hub.repos[f"me/{repo}"]["README.md"].decode()) == ([], [])
    data = ModelCard(hub.repos["me/classifier"]["README.md"].decode()).data
    assert (data.license, data.language) == ("apache-2.0", "en"), "of the base model's repository"
    (result,) = data.eval_results
    assert (result.dataset_type, result.dataset_config) == ("nyu-mll/glue", "sst2")
    assert result.dataset_split == "validation"
