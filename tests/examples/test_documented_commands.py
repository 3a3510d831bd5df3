"""The commands in the docstrings of the examples run as they are written.

The names of models and data on the Hub are those of local folders with tiny ones.
"""

import importlib
import json
import re
import shlex
import shutil

import datasets
import pyarrow.parquet as pq
import pytest
from support.local_hub import write_dataset
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

EXAMPLES = {
    "run_glue": None,
    "run_clm": None,
    "run_image_classification": None,
    "sft_with_noise": "trl",
    "sentence_transformer_with_noise": "sentence_transformers",
}


def documented_commands(example: str) -> list[list[str]]:
    """Return the words of the commands in the docstring of an example, without the script."""
    module = importlib.import_module(example)
    text = re.sub(r" *\\\n *", " ", module.__doc__)
    found = re.findall(rf"^    python examples/{example}\.py (.+)$", text, re.MULTILINE)
    return [shlex.split(command) for command in found]


@pytest.fixture
def place(tmp_path, monkeypatch, request):
    """Return a function that fills the current folder with an example's models and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def fill(example: str) -> None:
        globals()[f"place_{example}"](tmp_path, request.getfixturevalue)

    return fill


def place_run_glue(folder, fixture):
    write_wider(fixture("tiny_model"), folder / "roberta-base")
    fixture("glue_files")(folder)
    shutil.copytree(fixture("metric_folder"), folder, dirs_exist_ok=True)
    shutil.move(folder / "validation.csv", folder / "dev.csv")
    splits = {}
    for split, count in (("train", 48), ("validation", 16), ("test", 4)):
        texts, labels = fixture("sentences")(count, count)
        splits[split] = {"sentence": texts, "label": labels if split != "test" else [-1] * count}
    write_dataset(folder, "nyu-mll/glue", "sst2", splits, ["negative", "positive"])


def write_wider(source, target, auto_class=AutoModel):
    """Write a random model with the tokenizer of another, wide enough for 256 centroids."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
    shutil.copytree(source, target)
    config = AutoConfig.from_pretrained(source, **sizes)
    auto_class.from_config(config).save_pretrained(target)


def place_run_clm(folder, fixture):
    write_wider(fixture("text_checkpoint"), folder / "gpt2", AutoModelForCausalLM)
    texts = fixture("texts")
    lines = texts["train"].read_text().splitlines() * 2
    for name in ("train.txt", "valid.txt"):
        (folder / name).write_text("\n".join(lines) + "\n")
    splits = {split: {"text": lines} for split in ("train", "validation")}
    write_dataset(folder, "Salesforce/wikitext", "wikitext-2-raw-v1", splits)


def place_run_image_classification(folder, fixture):
    from test_run_image_classification import write_checkpoint, write_images

    for name in ("google/mobilenet_v1_0.75_192", "a/checkpoint"):
        write_checkpoint(folder / name)
    shutil.copytree(fixture("metric_folder"), folder, dirs_exist_ok=True)
    files = write_images(folder)
    shutil.copy(files["validation"], folder / "test.parquet")
    tables = {split: pq.read_table(path).to_pydict() for split, path in files.items()}
    splits = {
        {"validation": "test"}.get(split, split): {"img": table["image"], "label": table["label"]}
        for split, table in tables.items()
    }
    write_dataset(folder, "uoft-cs/cifar10", "plain_text", splits)


def place_sft_with_noise(folder, fixture):
    write_wider(fixture("text_checkpoint"), folder / "gpt2", AutoModelForCausalLM)
    chat_model = folder / "HuggingFaceTB/SmolLM2-135M-Instruct"
    write_wider(fixture("text_checkpoint"), chat_model, AutoModelForCausalLM)
    config = chat_model / "tokenizer_config.json"
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": template}))
    lines = fixture("texts")["train"].read_text().splitlines()[:16]
    for name in ("train.jsonl", "valid.jsonl"):
        (folder / name).write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    chats = [[{"role": "user", "content": line}] for line in lines]
    splits = {"train": {"messages": chats}, "test": {"messages": chats}}
    write_dataset(folder, "trl-lib/Capybara", "default", splits)


def place_sentence_transformer_with_noise(folder, fixture):
    model = folder / "sentence-transformers/all-MiniLM-L6-v2"
    write_wider(fixture("tiny_model"), model)
    texts, labels = fixture("sentences")(32, 0)
    scores = [float(a == b) for a, b in zip(labels[::2], labels[1::2], strict=True)]
    columns = {"sentence1": texts[::2], "sentence2": texts[1::2], "score": scores}
    for name in ("train.csv", "valid.csv"):
        datasets.Dataset.from_dict(columns).to_csv(folder / name)
    splits = {"train": columns, "test": columns}
    write_dataset(folder, "sentence-transformers/stsb", "default", splits)


SLOW = [name for name in EXAMPLES if name.startswith("run_")]  # with own tests


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    "example",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in EXAMPLES],
)
def test_documented_command_runs(example, number, place, tmp_path):
    if package := EXAMPLES[example]:
        pytest.importorskip(package)
    commands = documented_commands(example)
    assert len(commands) == 2
    place(example)
    importlib.import_module(example).main(commands[number])
    assert (tmp_path / "out" / "compressed").is_dir()
