"""run_clm.py the whole way on a tiny model, and what it says to mistakes."""

import json
import math

import pytest
import torch
from run_clm import cut, main
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = [f"w{number}" for number in range(40)]


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny Llama with a tokenizer of one token per word."""
    vocabulary = {"<unk>": 0, "</s>": 1, "<nl>": 2}
    vocabulary |= {word: number + 3 for number, word in enumerate(WORDS)}
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
        ids = torch.randint(0, len(WORDS), (lines, 12), generator=generator).sort(1).values
        paths[split] = tmp_path / f"{split}.txt"
        paths[split].write_text("".join(" ".join(WORDS[i] for i in row) + "\n" for row in ids))
    return paths


def flags(checkpoint, texts, tmp_path, *more):
    return [
        *("--model_name_or_path", str(checkpoint), "--train_file", str(texts["train"])),
        *("--validation_file", str(texts["validation"]), "--output_dir", str(tmp_path / "out")),
        *("--sequence_length", "16", "--num_train_epochs", "1", "--save_strategy", "no"),
        *("--per_device_train_batch_size", "8", "--n_centroids", "8", "--stage_epochs", "0.5"),
        *("--learning_rate", "1e-3", "--disable_tqdm", "True", *more),
    ]


@pytest.mark.parametrize(
    "settings",
    [
        ["--noise", "proxy", "--noise_schedule", "3", "--layerdrop", "0.2"],
        ["--noise", "pq", "int8", "--codebook_bits", "8", "--activation_bits", "8"],
        ["--noise", "int4", "--scheme", "fixed_point", "--bits", "4", "--observer", "channel"],
        ["--noise", "mean", "--noise_block_selection", "cluster", "--codebook_bits", "16"],
        ["--noise", "int8", "--noise_observer", "histogram", "--share_layers", "2"],
        ["--noise", "none", "--scheme", "fixed_point", "--prune_layers", "every_other"],
    ],
)
def test_the_whole_way(checkpoint, texts, tmp_path, settings, capsys):
    values = main(flags(checkpoint, texts, tmp_path, *settings))
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["reloaded"]["logits_bit_equal"] is True
    for part in ("dense", "reloaded"):
        metrics = stored[part]["metrics"]
        assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
        # One token per word, and an end of line per twelve of them.
        ratio = math.log(metrics["word_perplexity"]) / metrics["loss"]
        assert ratio == pytest.approx(12 / 13, rel=1e-3)
    assert stored["compressed"]["bytes"] < stored["dense"]["bytes"]
    assert "perplexity" in capsys.readouterr().out
    assert values["examples"] == {"train": 45, "validation": 15}
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "compressed")
    assert small.is_quantized


def test_pieces_are_the_stream_without_gaps(checkpoint):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    lines = [" ".join(WORDS[i : i + 5]) + "\n" for i in range(0, 20, 5)]
    pieces = cut(lines, tokenizer, 6, None, "--train_file")
    assert [row for rows in pieces.rows["input_ids"] for row in rows] == list(range(3, 21))
    assert pieces.tokens == 3 * 5
    assert pieces.words == pytest.approx(24 * 15 / 20)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--train_file": "nowhere.txt"}, "--train_file 'nowhere.txt' is no file"),
        ({"--sequence_length": "1"}, "--sequence_length 1 must be 2 or more"),
        ({"--sequence_length": "65"}, "--sequence_length 65 is more than the model's 64 positions"),
        ({"--max_eval_samples": "3", "--noise": "pqq"}, "unknown noise 'pqq'"),
        ({"--share_layers": "two"}, "--share_layers 'two' is no number of layers"),
        ({"--prune_layers": ".*9"}, "prune_layers='.\\*9' matches no layer of the model"),
    ],
)
def test_mistakes_are_named(checkpoint, texts, tmp_path, change, words):
    given = flags(checkpoint, texts, tmp_path)
    for name, value in change.items():
        if name in given:
            given[given.index(name) + 1] = value
        else:
            given += [name, value]
    with pytest.raises(ValueError, match=words):
        main(given)


def test_text_shorter_than_an_example_is_refused(checkpoint, texts, tmp_path):
    texts["train"].write_text("w1 w2 w3\n")
    with pytest.raises(ValueError, match="--train_file has 3 tokens, less than --sequence_length"):
        main(flags(checkpoint, texts, tmp_path))
