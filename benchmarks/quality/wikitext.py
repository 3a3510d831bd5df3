"""WikiText-2 of the language-model study: splits, tokenizer, models and their evaluation.

The last articles of ``train.txt`` are held out: every setting is chosen on them, and no training
run sees them. ``valid.txt`` (its first 131,072 tokens) is only reported.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hf_quantnoise.runs.clm import TokenizedText, perplexities, split_into_examples

HELD_OUT_SHARE = 0.05
LIMITS = {"held_out": 65_536, "dev": 131_072}  # tokens that are evaluated
LENGTHS = {"llama": 256, "stories": 128}  # tokens of a sequence; batches have 2,048 tokens
BATCH_TOKENS = 2048
END = "<|endoftext|>"
UNKNOWN = "<unk>"  # a word of WikiText-2


@dataclass(frozen=True)
class Texts:
    """Tokenized splits: the training text without the held-out articles, these, and valid.txt."""

    train: TokenizedText
    held_out: TokenizedText
    dev: TokenizedText


def read_lines(data_dir: str) -> dict[str, list[str]]:
    """Return the lines of the splits. The held-out text begins with an article."""

    def read(name: str) -> list[str]:
        with open(os.path.join(data_dir, name), encoding="utf-8") as file:
            return file.readlines()

    lines = read("train.txt")
    start = int(len(lines) * (1 - HELD_OUT_SHARE))
    while not (lines[start].startswith(" = ") and not lines[start].startswith(" = = ")):
        start += 1
    return {"train": lines[:start], "held_out": lines[start:], "dev": read("valid.txt")}


def load_texts(data_dir: str, model_dir: str, length: int) -> Texts:
    """Tokenize the splits into sequences of ``length`` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def tokenize(name: str, lines: list[str]) -> TokenizedText:
        limit = LIMITS[name] // length if name in LIMITS else None
        return split_into_examples(lines, tokenizer, length, limit, name)

    return Texts(**{name: tokenize(name, lines) for name, lines in read_lines(data_dir).items()})


def train_tokenizer(data_dir: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the training text."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        read_lines(data_dir)["train"],
        vocab_size=vocab_size,
        special_tokens=[END, UNKNOWN],
        show_progress=False,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END, unk_token=UNKNOWN
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return an untrained Llama of 5.1 million parameters with a tied head."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def smaller_model(model: PreTrainedModel, layers: int, ffn: int) -> PreTrainedModel:
    """Return a Llama with the first layers of another one, and the first units of their FFN."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.intermediate_size = layers, ffn
    small = type(model)(config)
    weights = model.state_dict()
    small.load_state_dict(
        {
            name: weights[name][tuple(map(slice, weight.shape))]
            for name, weight in small.state_dict().items()
        }
    )
    return small


def length_of(name: str) -> int:
    """Return the sequence length of a model; stories-3x172 is a part of stories."""
    return LENGTHS[name.partition("-")[0]]


_float32_scores: dict[tuple[str, str], dict] = {}


def float32_scores(
    folder: str, model: PreTrainedModel, split: str, text: TokenizedText
) -> dict[str, float]:
    """Return loss and perplexities of a float32 model; the values of a folder are computed once."""
    if (folder, split) not in _float32_scores:
        scores = evaluate(model, text, None)
        del scores["losses"]
        _float32_scores[folder, split] = scores
    return _float32_scores[folder, split]


@torch.no_grad()
def evaluate(model: PreTrainedModel, text: TokenizedText, teacher: PreTrainedModel | None) -> dict:
    """Return the loss per token in nats, perplexities, and how far the model is from its teacher.

    Returns:
        ``loss``, ``perplexity``, ``word_perplexity`` (as in the literature: the nats of all tokens
        per word, ends of lines counted), ``losses`` (mean of each sequence); with a teacher
        ``divergence`` (KL(teacher || model) per token, nats) and ``agreement`` (share of equal
        predictions).
    """
    model.eval()
    ids = torch.tensor(text.rows["input_ids"])
    losses, divergences, agreements = [], [], []
    for batch in ids.split(16):
        log_q = F.log_softmax(model(batch).logits[:, :-1].float(), -1)
        targets = batch[:, 1:, None]
        losses += (-log_q.gather(-1, targets)).mean((1, 2)).tolist()
        if teacher is not None:
            log_p = F.log_softmax(teacher(batch).logits[:, :-1].float(), -1)
            divergences.append(F.kl_div(log_q, log_p, log_target=True, reduction="sum").item())
            agreements.append((log_q.argmax(-1) == log_p.argmax(-1)).sum().item())
    scores = {"loss": math.fsum(losses) / len(losses)}
    scores |= perplexities(scores, text)
    if teacher is not None:
        scores["divergence"] = math.fsum(divergences) / text.tokens
        scores["agreement"] = sum(agreements) / text.tokens
    return {**scores, "losses": [round(loss, 4) for loss in losses]}
