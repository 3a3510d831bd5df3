"""A folder as written by an example: ``out/dense`` and ``out/compressed``."""

import shlex
import shutil

import pytest
import torch
from support.tiny import SIZES
from transformers import BertConfig, BertForSequenceClassification

from hf_quantnoise.cli import main

# Large enough for 256 centroids, the default.
WIDE = {**SIZES, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
CARD = "---\nlicense: mit\n---\n# A model\n"


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The folder; tests must not change it."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**WIDE))
    model.save_pretrained(folder / "out" / "dense")
    (folder / "out" / "dense" / "tokenizer_config.json").write_text('{"made": "by hand"}')
    (folder / "out" / "dense" / "README.md").write_text(CARD)
    (folder / "out" / "dense" / "optimizer.pt").write_text("not part of a model")
    folders = [str(folder / "out" / name) for name in ("dense", "compressed")]
    assert main(["compress", *folders, "--kmeans_iter", "2"]) == 0
    return folder


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """A copy of it, as the current directory."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys):
    """Run a command line; return exit code, stdout and stderr."""

    def run(line: str) -> tuple[int, str, str]:
        words = shlex.split(line)
        capsys.readouterr()
        try:
            code = main(words[words[0] == "hf-quantnoise" :])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def no_weights(monkeypatch):
    """Make loading of weights an error."""

    def fail(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", fail)
