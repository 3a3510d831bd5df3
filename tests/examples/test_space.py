"""The Space in ``examples/space``: started on the loopback, and its button clicked.

gradio is in its own environment (``make test-space``), since it requires an older pillow.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import SpaceCard
from support.tiny import SIZES, make_model
from support.words import words
from transformers import BertConfig, BertForSequenceClassification

from hf_quantnoise import IPQConfig, quantize_model

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "space"
OWN = ROOT / ".venv-space" / "bin" / "python"
CLIENT = """
import json, sys
from gradio_client import Client
client = Client(sys.argv[1], verbose=False)
rows, summary = client.predict("w3 w4", sys.argv[2], api_name="/compare")
try:
    client.predict(" ", sys.argv[2], api_name="/compare")
except Exception as error:
    print(json.dumps([rows, summary, str(error)]))
"""
# Prints the rows, or the type and message of the error, for each text and compressed model.
COMPARE = """
import json, sys
import app
for text, name in json.loads(sys.argv[1]):
    try:
        rows, _ = app.compare(text, name, "dense")
        print(json.dumps([row[:3] for row in rows]))
    except Exception as error:
        print(json.dumps([type(error).__name__, getattr(error, "message", str(error))]))
"""


@pytest.fixture(scope="module")
def python() -> str:
    """Interpreter of an environment with gradio."""
    if OWN.exists():
        return str(OWN)
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed; run make test-space")
    return sys.executable


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folder with a dense model and two compressed ones."""
    folder = tmp_path_factory.mktemp("space")
    for name, block_size in (("dense", None), ("compressed", 4), ("smaller", 8)):
        model = make_model("bert")
        if block_size:
            quantize_model(model, IPQConfig(block_size=block_size, n_centroids=16))
        model.save_pretrained(folder / name)
        words().save_pretrained(folder / name)
    make_model("bert").bert.save_pretrained(folder / "headless")
    words().save_pretrained(folder / "headless")
    BertForSequenceClassification(BertConfig(**SIZES, num_labels=1)).save_pretrained(
        folder / "regression"
    )
    make_model("bert").save_pretrained(folder / "wordless")
    for name in ("bert", "roberta"):
        tokenizer = words()
        tokenizer.model_max_length = int(1e30)  # as that of a tokenizer without a limit
        make_model(name).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def answers(python, models):
    """Return the rows, or type and message of the error, for texts and compressed models."""

    def compare(*cases: tuple[str | None, str | None]) -> list[list]:
        path = os.pathsep.join([str(ROOT), str(FOLDER)])
        done = subprocess.run(
            [python, "-c", COMPARE, json.dumps(cases)],
            capture_output=True, text=True, cwd=models, env=settings(PYTHONPATH=path), timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return compare


def settings(**variables: str) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **offline, **variables}


@pytest.fixture
def address(python, models, tmp_path):
    """Address of the running Space, with the models given as in the settings of a Space."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"DENSE_MODEL": "dense", "COMPRESSED_MODELS": "compressed, smaller"}
    log = tmp_path / "log"
    command = [python, str(FOLDER / "app.py"), "--port", str(port)]
    with log.open("w") as out:
        server = subprocess.Popen(
            command, cwd=models, env=settings(**names), stdout=out, stderr=subprocess.STDOUT
        )
    try:
        for _ in range(600):  # importing gradio and transformers takes a while
            assert server.poll() is None, log.read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.slow
def test_space_compares_a_compressed_model_with_the_dense_one(address, python, models):
    done = subprocess.run(
        [python, "-c", CLIENT, address, "smaller"],
        capture_output=True, text=True, env=settings(), timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table, summary, error = json.loads(done.stdout.splitlines()[-1])
    assert [row[0] for row in table["data"]] == ["dense", "smaller"]
    sizes = [(models / name / "model.safetensors").stat().st_size for name in ("dense", "smaller")]
    assert [row[3] for row in table["data"]] == [f"{size / 1e6:.2f}" for size in sizes]
    assert float(table["data"][1][4]) == pytest.approx(sizes[0] / sizes[1], abs=0.1)
    assert all(row[1] in ("LABEL_0", "LABEL_1") and float(row[5]) > 0 for row in table["data"])
    assert f"{sizes[0] / sizes[1]:.1f} times smaller" in summary
    assert error == "Enter a text."


@pytest.mark.slow
def test_missing_models_are_an_error_with_a_way_out(python):
    done = subprocess.run(
        [python, str(FOLDER / "app.py")], capture_output=True, text=True, env=settings()
    )
    assert done.returncode == 2
    assert "set DENSE_MODEL and COMPRESSED_MODELS" in done.stderr


@pytest.mark.slow
def test_a_model_that_is_not_there_is_an_error_at_the_start(python, models):
    command = [python, str(FOLDER / "app.py"), "--dense", "a/b", "--compressed", "compressed"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=models, env=settings())
    assert done.returncode == 1
    assert "error: invalid --dense 'a/b': no folder 'a/b'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_compare_refuses_models_that_cannot_answer(answers):
    names = ("headless", "regression", "wordless", "missing/model", "../outside", None)
    reasons = (
        "would be random", "it has one output", "only special tokens", "no repository of this name",
        "not a valid name of a repository", "Choose a compressed model",
    )  # fmt: skip
    found = answers(*(("w3 w4", name) for name in names))
    for name, reason, (kind, message) in zip(names, reasons, found, strict=True):
        assert kind == "Error", message  # that of gradio, which the page shows
        assert reason in message
        assert name is None or message.startswith(f"invalid --compressed {name!r}: ")


@pytest.mark.slow
def test_compare_truncates_to_the_positions_of_the_model(answers):
    cases = [
        (text, name)
        for name, limit in (("bert", 64), ("roberta", 62))  # RoBERTa has 64 positions, too
        for text in ("w3 " * limit, "w3 " * limit + "w4 " * 400)
    ]
    short_bert, long_bert, short_roberta, long_roberta = answers(*cases)
    assert short_bert[1][0] == "bert" and short_roberta[1][0] == "roberta"
    assert (long_bert[1], long_roberta[1]) == (short_bert[1], short_roberta[1])


@pytest.mark.slow
def test_compare_refuses_texts_without_words_or_beyond_the_limit(answers):
    for text, reason in ((None, "Enter a text"), ("w3 " * 10_000, "at most 20,000 characters")):
        ((kind, message),) = answers((text, "compressed"))
        assert (kind, reason in message) == ("Error", True), message


def test_header_of_the_space_describes_its_files():
    card = SpaceCard.load(FOLDER / "README.md").data
    assert (card.sdk, card.license) == ("gradio", "apache-2.0")
    assert (FOLDER / card.app_file).is_file()
    assert len(card.to_dict()["short_description"]) <= 60
    assert "hf-quantnoise @ git+https" in (FOLDER / "requirements.txt").read_text()
