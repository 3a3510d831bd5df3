"""Tiny random models of real architectures."""

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
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
    """Return a tiny random model in eval mode, always the same for a seed."""
    torch.manual_seed(seed)
    return MAKERS[name]().eval()


IMAGE_SIZE = 32
CLASSES = {"num_labels": 4}
VISION_MAKERS = {
    "mobilenet-v1": lambda: MobileNetV1ForImageClassification(
        MobileNetV1Config(image_size=IMAGE_SIZE, depth_multiplier=0.125, **CLASSES)
    ),
    "mobilenet-v2": lambda: MobileNetV2ForImageClassification(
        MobileNetV2Config(image_size=IMAGE_SIZE, depth_multiplier=0.25, **CLASSES)
    ),
    "efficientnet": lambda: EfficientNetForImageClassification(
        EfficientNetConfig(
            image_size=IMAGE_SIZE, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320,
            initializer_range=0.3, **CLASSES,  # 0.02 is too small for so few channels
        )
    ),
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", **CLASSES
        )
    ),
    "convnext": lambda: ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, **CLASSES)
    ),
}  # fmt: skip


def make_vision_model(name: str, seed: int = 0):
    """Return a tiny random image classifier whose BatchNorm buffers have been updated."""
    torch.manual_seed(seed)
    model = VISION_MAKERS[name]().train()
    with torch.no_grad():
        model(pixel_values=torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE))
    return model.eval()


def recompute(model, use_reentrant: bool) -> None:
    """Turn on activation checkpointing, called gradient checkpointing before 5.23."""
    old = "gradient_checkpointing_enable"
    enable = getattr(model, "activation_checkpointing_enable", None) or getattr(model, old)
    enable({"use_reentrant": use_reentrant})


def with_dropout(model, rate=0.2):
    """Set the rate of all dropout modules, in place."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
    return model
