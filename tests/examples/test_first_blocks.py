"""The first blocks of the README and of each page run as they are pasted, without other names.

Models and data of the Hub are local folders of the same names with tiny ones; the folders in
``out`` are those that the quickstart writes.
"""

import contextlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
from support.local_hub import write_dataset
from test_documented_commands import place_run_clm, write_wider
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    set_seed,
)

from hf_quantnoise import AutoQuantizedModel
from hf_quantnoise.cli import main as command_line
from hf_quantnoise.runs.closing_table import weights_mb

ROOT = Path(__file__).resolve().parents[2]
README, QUICKSTART = ROOT / "README.md", ROOT / "docs" / "tutorials" / "quickstart.md"
TUTORIAL = ROOT / "docs" / "tutorials" / "language_model.md"
ERRORS = ROOT / "docs" / "how_to" / "common_errors.md"
PAGES = [
    page
    for page in sorted((ROOT / "docs").rglob("*.md"))
    if "```python" in page.read_text() and page not in (QUICKSTART, TUTORIAL, ERRORS)
]
NEEDS = {"other_trainers.md": "trl", "metrics.md": "evaluate"}
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def run(*code: str) -> dict:
    """Run blocks one after the other in a new namespace, which is returned."""
    names = {"__name__": "__main__"}
    for block in code:
        exec(compile(block, "block of a page", "exec"), names)
    return names


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tiny_model):
    """A folder with a tiny model and dataset in place of those of the Hub."""
    folder = tmp_path_factory.mktemp("reader")
    write_wider(tiny_model, folder / MINILM)
    config = AutoConfig.from_pretrained(
        folder / MINILM, vocab_size=1000, hidden_size=128, intermediate_size=512
    )
    set_seed(0)
    AutoModel.from_config(config).save_pretrained(folder / MINILM)
    return folder


@pytest.fixture
def reader(hub, monkeypatch, sentences):
    """The folder of a reader, as the current one; with the data of GLUE."""
    monkeypatch.chdir(hub)
    if not (hub / "nyu-mll").exists():
        splits = {}
        for split, count in (("train", 128), ("validation", 40)):
            texts, labels = sentences(count, count)
            splits[split] = {"sentence": texts, "label": labels}
        write_dataset(hub, "nyu-mll/glue", "sst2", splits, ["negative", "positive"])
    return hub


@pytest.fixture
def quickstart(reader):
    """The folder after the quickstart, which runs once, without the block "instead of" another."""
    if not (reader / "out" / "train").is_dir():
        run(*(block for block in blocks(QUICKSTART) if "stage_epochs" not in block))
    return reader


def test_readme_block_compresses_digits(tmp_path, monkeypatch, capsys, caplog):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    set_seed(0)
    names = run(blocks(README)[0])
    assert [each for each in caplog.records if each.name.startswith("hf_quantnoise")] == []
    dense, small = (row for row in names["trainer"].compression_history)
    assert dense["mb"] > 20 * small["mb"], "as the recipe promises"
    assert small["mb"] == pytest.approx(weights_mb(tmp_path / "out" / "small"), rel=0.01)
    printed = capsys.readouterr().out
    scores = [
        float(line.split(":")[1]) for line in printed.splitlines() if line[:3] in ("flo", "20x")
    ]
    assert scores[1] == small["metric"]["eval_accuracy"] > 0.8, "chance is 0.1"
    assert scores[0] > 0.8 and f"{small['mb']:.3f} MB" in printed
    assert names["model"].config.quantization_config.quant_method == "hf_quantnoise"


def test_readme_block_compresses_a_glue_task(reader, capsys):
    pytest.importorskip("datasets")
    names = run(blocks(README)[1])
    dense, small = names["trainer"].compression_history
    assert dense["mb"] > 13 * small["mb"]
    printed = capsys.readouterr().out
    assert "\n13x smaller: " in printed and "[{'label': 'LABEL_" in printed


def test_quickstart_writes_the_folders_that_other_pages_use(quickstart):
    pytest.importorskip("datasets")
    dense = AutoModelForSequenceClassification.from_pretrained(quickstart / "out" / "dense")
    small = AutoQuantizedModel.from_pretrained(quickstart / "out" / "small")
    assert type(small).__bases__ and small.config.num_labels == dense.config.num_labels
    assert weights_mb("out/dense") > 13 * weights_mb("out/small")
    assert (quickstart / "out" / "small" / "tokenizer.json").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_first_block_of_a_page_runs(page, quickstart, request):
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
        globals()[f"place_{page.stem}"](quickstart, request.getfixturevalue)
    try:
        run(blocks(page)[0])
    except ValueError as error:
        if "AVX-512 VNNI" not in str(error):
            raise
        pytest.skip(str(error))


def test_blocks_of_the_page_about_target_sizes_run_in_order(quickstart):
    pytest.importorskip("datasets")
    names = run(*blocks(ROOT / "docs/how_to/target_size.md"))
    small, config = names["small"], names["config"]
    edited = "bert.encoder.layer.0.attention.self.query"
    assert config.layer_quantizers[edited] == {"scheme": "int", "bits": 8}
    assert small.config.quantization_config.plan[edited]["bits"] == 8
    assert (quickstart / "allocation.json").is_file()


def test_evaluator_block_of_the_page_about_metrics_runs(quickstart, request):
    pytest.importorskip("evaluate")
    page = ROOT / "docs/how_to/metrics.md"
    place_metrics(quickstart, request.getfixturevalue)
    names = run(blocks(page)[1])
    assert 0 <= names["scores"]["accuracy"] <= 1


def place_metrics(folder: Path, fixture) -> None:
    """Write a metric, which is preferred to that of the Hub."""
    source = ROOT / "tests/support/metrics/accuracy"
    shutil.copytree(source, folder / "accuracy", dirs_exist_ok=True)


def place_other_trainers(folder: Path, fixture) -> None:
    """Write the model and the dataset of the page about other trainers."""
    from test_documented_commands import place_sft_with_noise

    if not (folder / "HuggingFaceTB").exists():
        place_sft_with_noise(folder, fixture)


def test_tutorial_of_language_models_runs(tmp_path, monkeypatch, request):
    """Its commands with a tiny model, dataset, target and number of epochs, then its blocks."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    place_run_clm(tmp_path, request.getfixturevalue)
    config = AutoConfig.from_pretrained("gpt2", hidden_size=128, intermediate_size=512)
    model = AutoModelForCausalLM.from_config(config)  # large enough for a recipe
    model.save_pretrained("gpt2")
    target = str(weights_mb("gpt2") / 10)
    text = re.sub(r" *\\\n *", " ", TUTORIAL.read_text())
    commands = re.findall(r"^    hf-quantnoise (.+)$", text, re.MULTILINE)
    for command in commands:
        command = command.replace("_mb 30", f"_mb {target}").replace("_epochs 4", "_epochs 1")
        with contextlib.suppress(SystemExit):
            command_line(shlex.split(command))
    assert weights_mb("gpt2") > 13 * weights_mb("out/clm/compressed")
    assert weights_mb("out/30mb/compressed") <= weights_mb("gpt2") / 10
    generate, allocate = blocks(TUTORIAL)
    run(generate)
    names = run(allocate.replace("_mb=30", f"_mb={target}").replace("1%", "100%"))
    assert names["config"].layer_quantizers and names["noise"].p == 1
