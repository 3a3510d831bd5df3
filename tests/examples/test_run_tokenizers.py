"""Tokenizers of the examples: missing ones, and texts as long as the model allows."""

import shutil

import pytest
import torch
from support.tiny import SIZES
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hf_quantnoise.runs import clm, glue
from hf_quantnoise.runs.arguments import ModelArguments
from hf_quantnoise.runs.tokenizers import position_limit

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
MISSING = r"--model_name_or_path '.*': its tokenizer (has only special|cannot be).*--tokenizer_name"


def without_tokenizer(source, folder):
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*TOKENIZER_FILES))
    return str(folder)


def test_glue_refuses_a_model_without_tokenizer(tiny_model, write_sets, tmp_path):
    """Transformers loads an empty tokenizer: all words would be the same token."""
    model = without_tokenizer(tiny_model, tmp_path / "bare")
    words = ["--model_name_or_path", model, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=MISSING):
        glue.main([*words, *write_sets(), "--metrics", "sklearn"])
    loaded = ModelArguments(model, tokenizer_name=tiny_model).load_tokenizer()
    assert loaded.get_vocab() == AutoTokenizer.from_pretrained(tiny_model).get_vocab()


def test_clm_refuses_a_model_without_tokenizer(text_checkpoint, texts, tmp_path):
    model = without_tokenizer(text_checkpoint, tmp_path / "bare")
    words = ["--model_name_or_path", model, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=MISSING):
        clm.main([*words, "--train_file", str(texts["train"]), "--do_eval", "False"])


def test_invalid_tokenizer_names_are_named(tiny_model, tmp_path):
    flags = ModelArguments(tiny_model, tokenizer_name=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"--tokenizer_name '.*nowhere'.*no folder"):
        flags.load_tokenizer()


@pytest.mark.parametrize("padding", [0, 1, 5])
def test_position_limit_of_roberta_excludes_the_padding(padding):
    model = RobertaForSequenceClassification(RobertaConfig(**SIZES, pad_token_id=padding)).eval()
    limit = position_limit(model)
    assert limit == SIZES["max_position_embeddings"] - padding - 1
    model(torch.full((1, limit), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, limit + 1), 7))


def test_position_limit_of_other_models_is_that_of_the_config():
    assert position_limit(BertModel(BertConfig(**SIZES))) == SIZES["max_position_embeddings"]
