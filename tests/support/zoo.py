"""One tiny random model, with a batch, of each architecture that the package is tested on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
)

from hf_quantnoise import IPQConfig
from hf_quantnoise.structure import find_layers
from support.stacked import make_stacked
from support.tiny import CLASSES, IMAGE_SIZE, SIZES, make_model, make_vision_model

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Grouped-query attention, and a head size that does not follow from the hidden size.
DECODER = {**SIZES, **TOKENS, "num_key_value_heads": 1, "head_dim": 16}
ENCODER_DECODER = {
    "vocab_size": SIZES["vocab_size"],
    "d_model": 32,
    **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
    **TOKENS,
    "decoder_start_token_id": 1,
}
EXPERTS = {**DECODER, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
IMAGES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "intermediate_size": 64, "image_size": IMAGE_SIZE, "patch_size": 8}  # fmt: skip


def _ids(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, SIZES["vocab_size"], shape, generator=generator)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _tokens() -> dict[str, Tensor]:
    ids = _ids(2, 9)
    return {"input_ids": ids, "labels": ids}


def _sentences() -> dict[str, Tensor]:
    return {"input_ids": _ids(2, 9), "labels": torch.tensor([0, 1])}


def _pairs() -> dict[str, Tensor]:
    ids = _ids(2, 9)
    return {"input_ids": ids, "labels": _ids(2, 6)}


def _images() -> dict[str, Tensor]:
    return {"pixel_values": _normal(3, 3, IMAGE_SIZE, IMAGE_SIZE), "labels": torch.arange(3) % 2}


def _captioned_images() -> dict[str, Any]:
    ids = _ids(3, 9)
    ids[:, -1] = SIZES["vocab_size"] - 1  # CLIP reads off the last token
    return {
        "input_ids": ids,
        "pixel_values": _normal(3, 3, IMAGE_SIZE, IMAGE_SIZE),
        "return_loss": True,
    }


def _spectrograms() -> dict[str, Tensor]:
    return {"input_features": _normal(2, 16, 32), "labels": _ids(2, 5)}


def _waves() -> dict[str, Tensor]:
    return {"input_values": _normal(2, 800), "labels": _ids(2, 5)}


@dataclass(frozen=True)
class Architecture:
    """One kind of model.

    Attributes:
        auto: the Auto class that loads it.
        make: returns a model in eval mode, always the same.
        batch: returns keyword arguments of a forward with labels.
    """

    auto: type
    make: Callable[[], PreTrainedModel]
    batch: Callable[[], dict[str, Any]]


def _made(auto: type, model_type: str, settings: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(model_type, **settings)).eval()


def _new(auto: type, model_type: str, batch: Callable[[], dict], **settings: Any) -> Architecture:
    return Architecture(auto, partial(_made, auto, model_type, settings), batch)


def _tiny(auto: type, name: str, batch: Callable[[], dict]) -> Architecture:
    return Architecture(auto, partial(make_model, name), batch)


def _stacked(auto: type, name: str, batch: Callable[[], dict]) -> Architecture:
    return Architecture(auto, partial(make_stacked, name, 2), batch)


def _vision(name: str) -> Architecture:
    make = partial(make_vision_model, name)
    return Architecture(AutoModelForImageClassification, make, _images)


_CAUSAL, _MASKED, _SEQ2SEQ = AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
_CLASSES, _IMAGES = AutoModelForSequenceClassification, AutoModelForImageClassification

ZOO: dict[str, Architecture] = {
    "BERT": _tiny(_MASKED, "bert-mlm", _tokens),
    "RoBERTa": _tiny(_MASKED, "roberta-mlm", _tokens),
    "DistilBERT": _stacked(_MASKED, "distilbert", _tokens),
    "ALBERT": _new(_MASKED, "albert", _tokens, **SIZES, embedding_size=16),
    "DeBERTa-v2": _stacked(_CLASSES, "deberta", _sentences),
    "ELECTRA": _new(_CLASSES, "electra", _sentences, **SIZES, embedding_size=16),
    "MPNet": _new(_MASKED, "mpnet", _tokens, **SIZES),
    "ModernBERT": _stacked(_MASKED, "modernbert", _tokens),
    "GPT-2": _tiny(_CAUSAL, "gpt2", _tokens),
    "GPT-NeoX": _new(_CAUSAL, "gpt_neox", _tokens, **SIZES, **TOKENS),
    "OPT": _new(_CAUSAL, "opt", _tokens, **SIZES, **TOKENS, ffn_dim=64, word_embed_proj_dim=16),
    "Bloom": _stacked(_CAUSAL, "bloom", _tokens),
    "Llama": _stacked(_CAUSAL, "llama", _tokens),
    "Llama, tied head": _new(_CAUSAL, "llama", _tokens, **DECODER, tie_word_embeddings=True),
    "Mistral": _new(_CAUSAL, "mistral", _tokens, **DECODER, sliding_window=4),
    "Qwen2": _stacked(_CAUSAL, "qwen2", _tokens),
    "Qwen3": _new(_CAUSAL, "qwen3", _tokens, **DECODER),
    "Gemma": _new(_CAUSAL, "gemma", _tokens, **DECODER),
    "Phi": _new(_CAUSAL, "phi", _tokens, **SIZES, **TOKENS),
    "Falcon": _new(_CAUSAL, "falcon", _tokens, **SIZES, **TOKENS),
    "Mixtral": _new(_CAUSAL, "mixtral", _tokens, **EXPERTS, num_local_experts=4),
    "Qwen2-MoE": _new(_CAUSAL, "qwen2_moe", _tokens, **EXPERTS, num_experts=4,
                      shared_expert_intermediate_size=32),
    "Qwen3-MoE": _new(_CAUSAL, "qwen3_moe", _tokens, **EXPERTS, num_experts=4),
    "Mamba": _new(_CAUSAL, "mamba", _tokens, **SIZES, **TOKENS, state_size=4, time_step_rank=4),
    "T5": _stacked(_SEQ2SEQ, "t5", _pairs),
    "BART": _stacked(_SEQ2SEQ, "bart", _pairs),
    "Marian": _new(_SEQ2SEQ, "marian", _pairs, **ENCODER_DECODER, max_position_embeddings=64),
    "Whisper": _new(AutoModelForSpeechSeq2Seq, "whisper", _spectrograms, **ENCODER_DECODER,
                    num_mel_bins=16, max_source_positions=16, max_target_positions=64,
                    suppress_tokens=None, begin_suppress_tokens=None),
    "Wav2Vec2": _new(AutoModelForCTC, "wav2vec2", _waves, **SIZES, **TOKENS, conv_dim=[16, 16],
                     conv_stride=[5, 4], conv_kernel=[10, 8], num_feat_extract_layers=2,
                     num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
                     mask_time_prob=0.0, layerdrop=0.0),
    "ViT": _stacked(_IMAGES, "vit", _images),
    "DeiT": _new(_IMAGES, "deit", _images, **IMAGES, **CLASSES,
                 architectures=["DeiTForImageClassification"]),
    "Swin": _new(_IMAGES, "swin", _images, image_size=IMAGE_SIZE, embed_dim=16, depths=[1, 1],
                 num_heads=[2, 2], window_size=4, **CLASSES),
    "ConvNeXt": _vision("convnext"),
    "ResNet": _vision("resnet"),
    "EfficientNet": _vision("efficientnet"),
    "MobileNetV1": _vision("mobilenet-v1"),
    "MobileNetV2": _vision("mobilenet-v2"),
    "CLIP": _new(AutoModel, "clip", _captioned_images, projection_dim=16,
                 text_config={**SIZES, **TOKENS, "eos_token_id": SIZES["vocab_size"] - 1},
                 vision_config=IMAGES),
}  # fmt: skip


# Architectures with tied weights -> how many layers hold the one table.
TIED = {"BERT": 2, "RoBERTa": 2, "DistilBERT": 2, "ALBERT": 2, "ModernBERT": 2, "GPT-2": 2,
        "Bloom": 2, "Llama, tied head": 2, "Gemma": 2, "Mamba": 2, "T5": 4, "BART": 4, "Marian": 4,
        "Whisper": 2}  # fmt: skip


def rows_of(batch: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Return the examples of a batch, as training data."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    size = len(next(iter(tensors.values())))
    return [{name: value[row] for name, value in tensors.items()} for row in range(size)]


def users_of_table(model: nn.Module) -> list[str]:
    """Return the names of the layers that use the input embeddings of a dense model."""
    table = next(layer for layer in find_layers(model) if layer.input_table)
    return [table.name, *table.ties]


def ipq_config(model: nn.Module) -> IPQConfig:
    """Return a config that quantizes everything but the head of a tiny model."""
    groups = {layer.group for layer in find_layers(model)} - {"head"}
    return IPQConfig(block_size=4, n_centroids=8, stages=sorted(groups))


def without_dropout(model: nn.Module) -> nn.Module:
    """Set the rate of all dropout modules to 0, in place."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def tensors_of(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of every tensor in a nested output of a forward."""
    if isinstance(output, Tensor):
        yield name, output
    items: Any = ()
    if isinstance(output, dict):
        items = output.items()
    elif isinstance(output, (list, tuple)):
        items = enumerate(output)
    for key, value in items:
        yield from tensors_of(value, f"{name}.{key}" if name else str(key))
