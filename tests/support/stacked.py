"""Tiny random models of many architectures with any number of layers."""

import copy

import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from support.tiny import GPT2_SIZES, GPT2_TOKENS, SIZES

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _small(layers: int) -> dict:
    return {**SIZES, "num_hidden_layers": layers}


STACKED = {
    "bert": lambda n: BertForSequenceClassification(BertConfig(**_small(n))),
    "roberta-mlm": lambda n: RobertaForMaskedLM(RobertaConfig(**_small(n))),
    "gpt2": lambda n: GPT2LMHeadModel(GPT2Config(**{**GPT2_SIZES, "n_layer": n}, **GPT2_TOKENS)),
    "llama": lambda n: LlamaForCausalLM(LlamaConfig(**_small(n), **TOKENS)),
    "bloom": lambda n: BloomForCausalLM(
        BloomConfig(vocab_size=320, hidden_size=32, n_layer=n, n_head=2, **TOKENS)
    ),
    "deberta": lambda n: DebertaV2ForSequenceClassification(
        DebertaV2Config(**_small(n), relative_attention=True, pos_att_type=["p2c", "c2p"])
    ),
    "distilbert": lambda n: DistilBertForMaskedLM(
        DistilBertConfig(vocab_size=320, dim=32, n_layers=n, n_heads=2, hidden_dim=64)
    ),
    "t5": lambda n: T5ForConditionalGeneration(
        T5Config(vocab_size=320, d_model=32, d_kv=16, d_ff=64, num_layers=n, num_heads=2,
                 decoder_start_token_id=0)
    ),
    "bart": lambda n: BartForConditionalGeneration(
        BartConfig(vocab_size=320, d_model=32, encoder_layers=n, decoder_layers=n,
                   encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
                   decoder_ffn_dim=64, **TOKENS)
    ),
    "vit": lambda n: ViTForImageClassification(
        ViTConfig(hidden_size=32, num_hidden_layers=n, num_attention_heads=2, intermediate_size=64,
                  image_size=32, patch_size=8)
    ),
}  # fmt: skip

# The layers differ by position: layer types in the config, a first layer without a norm.
BY_PLACE = {
    "qwen2": lambda n: Qwen2ForCausalLM(
        Qwen2Config(**_small(n), **TOKENS, layer_types=_alternating(n), sliding_window=4,
                    use_sliding_window=True, num_key_value_heads=2)
    ),
    "modernbert": lambda n: ModernBertForMaskedLM(
        ModernBertConfig(**_small(n), **TOKENS, cls_token_id=1, sep_token_id=2,
                         global_attn_every_n_layers=3)
    ),
}  # fmt: skip


def _alternating(layers: int) -> list[str]:
    return ["sliding_attention" if n % 2 else "full_attention" for n in range(layers)]


def make_stacked(name: str, layers: int = 3) -> nn.Module:
    """Return a model in eval mode without dropout, always the same."""
    torch.manual_seed(0)
    return without_dropout({**STACKED, **BY_PLACE}[name](layers))


def without_dropout(model: nn.Module) -> nn.Module:
    """Put a model in eval mode and set the rate of its dropout modules to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def inputs_of(name: str) -> dict:
    """Return keyword arguments of a forward."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    ids = torch.randint(5, 320, (2, 9), generator=generator)
    more = {"decoder_input_ids": ids[:, :5]} if name in ("t5", "bart") else {}
    return {"input_ids": ids, **more}


@torch.no_grad()
def logits(model: nn.Module, name: str = "bert") -> torch.Tensor:
    """Return the logits of a model in eval mode for :func:`inputs_of` ``(name)``."""
    return model.eval()(**inputs_of(name)).logits


def perturbed(model, seed=7):
    """Return a copy of a model with other weights."""
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return changed
