"""A tiny BERT on disk, tiny datasets, and the benchmarks on the path."""

import json
import os
import random
import sys
from functools import partial
from pathlib import Path

import pandas
import pytest
import torch
from support.checkpoint_labels import NO_HEAD
from support.glue_runs import run_glue
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parents[2]
# The examples are on the path for all tests (pyproject.toml), the benchmarks for these.
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "quality")]

WORDS = ["a", "the", "film", "plot", "cast", "scene", "was", "is", "and", "very", "null", "n/a"]
GOOD = ["good", "bright", "warm", "witty", "moving"]
BAD = ["bad", "dull", "cold", "flat", "boring"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """Folder of a random BERT (hidden 32, 2 layers, no classification head) with a tokenizer."""
    from transformers import BertConfig, BertModel, BertTokenizerFast, set_seed

    folder = tmp_path_factory.mktemp("tiny_bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = sorted({*"abcdefghijklmnopqrstuvwxyz/", *WORDS, *GOOD, *BAD})
    vocabulary = [*special, *pieces, *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64)
    set_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def random_sentences(count: int, seed: int) -> tuple[list[str], list[int]]:
    """Return random sentences, with label 1 for a good word in it and 0 for a bad one."""
    draw = random.Random(seed)
    texts, labels = [], []
    for _ in range(count):
        label = draw.randrange(2)
        words = [*draw.choices(WORDS, k=draw.randrange(2, 9)), draw.choice((BAD, GOOD)[label])]
        draw.shuffle(words)
        texts.append(" ".join(words))
        labels.append(label)
    return texts, labels


@pytest.fixture
def sentences():
    """:func:`random_sentences`."""
    return random_sentences


WRITERS = {
    "csv": lambda frame, path: frame.to_csv(path, index=False),
    "json": lambda frame, path: frame.to_json(path, orient="records"),
    "jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "parquet": lambda frame, path: frame.to_parquet(path),
}


@pytest.fixture
def write(tmp_path):
    """Write columns to a file in the folder of the test; return its path."""

    def write_file(name: str, columns: dict[str, list]) -> str:
        path = tmp_path / name
        WRITERS[path.suffix[1:]](pandas.DataFrame(columns), path)
        return str(path)

    return write_file


def write_glue_files(folder: Path, extension: str = "csv", names=(0, 1), pair: bool = False):
    """Write 64 training and 24 validation sentences; return the flags of the files.

    Args:
        names: the two labels.
        pair: whether an example is a pair of sentences.
    """
    flags = []
    for flag, count, seed in (("train", 64, 0), ("validation", 24, 1)):
        texts, labels = random_sentences(count, seed)
        columns = {"sentence": texts, "label": [names[label] for label in labels]}
        if pair:
            columns = {"sentence1": texts, "sentence2": texts[::-1], "label": columns["label"]}
        path = folder / f"{flag}.{extension}"
        WRITERS[extension](pandas.DataFrame(columns), path)
        flags += [f"--{flag}_file", str(path)]
    return flags


@pytest.fixture(scope="session")
def glue_files():
    """:func:`write_glue_files`."""
    return write_glue_files


@pytest.fixture
def write_sets(tmp_path):
    """:func:`write_glue_files` in the folder of the test."""
    return partial(write_glue_files, tmp_path)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data and weights, which is not part of the project."""
    folder = Path(os.environ.get("HF_QUANTNOISE_SHARED", ROOT.parent / "shared"))
    if not (folder / "models" / "minilm").is_dir() or not (folder / "data" / "sst2").is_dir():
        pytest.skip(f"no models/minilm and data/sst2 in {folder}; set HF_QUANTNOISE_SHARED")
    return folder


@pytest.fixture
def changed():
    """Return a command line with the values of some flags replaced or added."""

    def change(words: list[str], values: dict[str, str]) -> list[str]:
        words = list(words)
        for name, value in values.items():
            if name in words:
                words[words.index(name) + 1] = value
            else:
                words += [name, value]
        return words

    return change


# ---- a language model and its text ---------------------------------------------------------------

NUMBERED = [f"w{index}" for index in range(40)]


@pytest.fixture
def text_checkpoint(tmp_path):
    """A tiny Llama with a tokenizer of one token per word."""
    vocabulary = {"<unk>": 0, "</s>": 1, "<nl>": 2}
    vocabulary |= {word: index + 3 for index, word in enumerate(NUMBERED)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, pad_token_id=1, eos_token_id=1,
    )  # fmt: skip
    folder = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path):
    generator = torch.Generator().manual_seed(0)
    paths = {}
    for split, lines in (("train", 60), ("validation", 20)):
        ids = torch.randint(0, len(NUMBERED), (lines, 12), generator=generator).sort(1).values
        paths[split] = tmp_path / f"{split}.txt"
        paths[split].write_text("".join(" ".join(NUMBERED[i] for i in row) + "\n" for row in ids))
    return paths


@pytest.fixture
def glue_start(tiny_model, sentences, tmp_path, monkeypatch):
    """Enter a folder with data, a float32 model and the row of its training; return the model's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sst2").mkdir()
    for split, count, seed in (("train", 80, 0), ("dev", 24, 1)):
        texts, labels = sentences(count, seed)
        pandas.DataFrame({"sentence": texts, "label": labels}).to_parquet(f"sst2/{split}.parquet")
    key = {"task": "sst2", "seed": 42, "learning_rate": 0.1, "epochs": 1}
    line = {"key": key, "held_out": {"accuracy": 0.5, "loss": 1.0}}
    (tmp_path / "float32.jsonl").write_text(json.dumps(line) + "\n")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model)
    model.classifier.weight.data *= 50  # so that quantization changes the logits
    folder = tmp_path / "models" / "sst2-42-0.1-1"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def start(tiny_model, tmp_path):
    """:func:`run_glue` on the tiny model, in the folder of the test."""

    def start(*flags: str, model: str = tiny_model, out: str = "out"):
        return run_glue(tmp_path, model, *flags, out=out)

    return start


@pytest.fixture
def load(tmp_path):
    """Load data by flags (``train_file=...``), with a cache in the folder of the test."""
    from hf_quantnoise.runs.arguments import ModelArguments
    from hf_quantnoise.runs.glue_data import DataArguments, load_glue_data

    def load_data(config=NO_HEAD, *, validation=True, new_head=False, **flags):
        cache = str(tmp_path / "cache")
        model = ModelArguments("m", cache_dir=cache, ignore_mismatched_sizes=new_head)
        splits = ["train", "validation"] if validation else ["train"]
        return load_glue_data(DataArguments(**flags), model, config, splits)

    return load_data
