"""Tiny random models of real architectures."""

import torch
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
