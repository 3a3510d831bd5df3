"""The notebooks: form, and execution with a tiny model and data in place of those of the Hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.local_hub import write_dataset
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, set_seed

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
SST2, MRPC = ["negative", "positive"], ["not_equivalent", "equivalent"]


def cells_of(name: str) -> list[dict]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]


@pytest.mark.parametrize("name", NAMES)
def test_notebook_has_a_badge_an_install_cell_and_no_outputs(name):
    first, install, *rest = cells_of(name)
    text = "".join(first["source"])
    assert f"hf-quantnoise/hf_quantnoise/blob/main/examples/notebooks/{name}.ipynb)" in text
    assert "%pip install" in "".join(install["source"])
    settings = "".join(rest[0]["source"])
    for line in settings.splitlines():
        if "os.environ.get" in line:
            assert f"`{line.split()[0]}`" in text, "the introduction lists the variables"
    code = [install, *(cell for cell in rest if cell["cell_type"] == "code")]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


SHELL = """
import sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
sys.exit(not all(shell.run_cell(source).success for source in sys.argv[1:]))
"""


@pytest.mark.parametrize("code", [0, 2])
@pytest.mark.parametrize("name", ["glue", "language_model"])
def test_notebook_stops_if_the_run_fails(name, code, tmp_path):
    """The cells below would show the files of an earlier run."""
    pytest.importorskip("IPython")
    command = tmp_path / "hf-quantnoise"
    command.write_text(f"#!/bin/sh\nexit {code}\n")
    command.chmod(0o755)
    sources = ["".join(cell["source"]) for cell in cells_of(name) if cell["cell_type"] == "code"]
    (run,) = (source for source in sources if "hf-quantnoise finetune" in source)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-c", SHELL, sources[1], run],
        cwd=tmp_path, env={**os.environ, "PATH": path, "IPYTHONDIR": str(tmp_path)}, timeout=120,
    )  # fmt: skip
    assert bool(done.returncode) == bool(code)


@pytest.mark.parametrize(("task", "is_pair"), [("mrpc", True), ("sst2", False), ("cola", False)])
def test_glue_notebook_classifies_a_text_of_its_task(task, is_pair, monkeypatch):
    seen = []

    class Pipeline:
        model, __call__ = None, staticmethod(seen.append)

    monkeypatch.setattr("transformers.pipeline", lambda *_, **__: Pipeline())
    monkeypatch.setattr("hf_quantnoise.optimize_for_inference", lambda *_: None)
    sources = ("".join(cell["source"]) for cell in cells_of("glue"))
    (source,) = (source for source in sources if "pipeline(" in source)
    exec(source, {"TASK": task})
    assert isinstance(seen[0], dict) == is_pair


def place_encoder(folder: Path, source: str) -> None:
    """Write the pretrained model: random, and large enough for a recipe."""
    target = folder / "sentence-transformers/all-MiniLM-L6-v2"
    shutil.copytree(source, target)
    set_seed(0)
    config = AutoConfig.from_pretrained(source, hidden_size=128, intermediate_size=512)
    AutoModel.from_config(config).save_pretrained(target)


def place_quickstart(folder, fixture):
    place_encoder(folder, fixture("tiny_model"))
    splits = {}
    for split, count in (("train", 64), ("validation", 16)):
        texts, labels = fixture("sentences")(count, count)
        splits[split] = {"sentence": texts, "label": labels}
    write_dataset(folder, "nyu-mll/glue", "sst2", splits, SST2)


def place_glue(folder, fixture):
    place_encoder(folder, fixture("tiny_model"))
    splits = {}
    for split, count in (("train", 64), ("validation", 16)):
        texts, labels = fixture("sentences")(count, count)
        splits[split] = {"sentence1": texts, "sentence2": texts[::-1], "label": labels}
    write_dataset(folder, "nyu-mll/glue", "mrpc", splits, MRPC)


def place_language_model(folder, fixture):
    source, target = fixture("text_checkpoint"), folder / "distilbert/distilgpt2"
    shutil.copytree(source, target)
    set_seed(0)
    config = AutoConfig.from_pretrained(source, hidden_size=128, intermediate_size=512)
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    lines = fixture("texts")["train"].read_text().splitlines()
    splits = {split: {"text": lines} for split in ("train", "validation")}
    write_dataset(folder, "Salesforce/wikitext", "wikitext-2-raw-v1", splits)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(name, tmp_path, metric_folder, monkeypatch, request):
    """All cells run without an error, in a folder named like the repositories of the Hub."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    folder = tmp_path / "notebook"
    folder.mkdir()
    shutil.copytree(metric_folder, folder, dirs_exist_ok=True)
    globals()[f"place_{name}"](folder, request.getfixturevalue)
    small = {"TRAIN_SAMPLES": "48", "EPOCHS": "1", "SIZE": "13x", "SEQUENCE_LENGTH": "16"}
    caches = {"IPYTHONDIR": "ipython", "HF_DATASETS_CACHE": "datasets"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for key, value in {**small, "PATH": path, "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(key, value)
    for key, value in caches.items():
        monkeypatch.setenv(key, str(tmp_path / value))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()  # raises the error of a cell
    dense, small = (folder / "out" / part / "model.safetensors" for part in ("dense", "compressed"))
    assert dense.stat().st_size > 13 * small.stat().st_size
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("times smaller" in str(output) for output in shown)
