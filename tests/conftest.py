"""Tiny random models of real architectures, and small data to train them on."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

VOCABULARY = 320
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": VOCABULARY}
GPT2_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

MAKERS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
    "bert-mlm": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES)),
    "roberta-mlm": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES, **GPT2_TOKENS)),
}
TIED = ("bert-mlm", "roberta-mlm", "gpt2")


def make_model(name: str, seed: int = 0):
    """A tiny random model, in eval mode, the same for the same seed."""
    torch.manual_seed(seed)
    return MAKERS[name]().eval()


@pytest.fixture(params=list(MAKERS))
def model(request):
    """Each tiny model in turn."""
    return make_model(request.param)


@pytest.fixture(params=TIED)
def tied_model(request):
    """Each tiny model whose head is tied to its table."""
    return make_model(request.param)


@pytest.fixture
def input_ids():
    """A batch of token ids, shape (3, 11), none of them padding."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, VOCABULARY, (3, 11), generator=generator)


@pytest.fixture(scope="session")
def parity_data():
    """A small learnable task: does the first of the eight tokens stand in the upper half?"""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, VOCABULARY, (96, 8), generator=generator)
    labels = (ids[:, 0] > VOCABULARY // 2).long()
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return Dataset.from_dict({name: tensor.tolist() for name, tensor in data.items()})
