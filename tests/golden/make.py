"""Create the golden checkpoints: tiny random models, one per kind of storage, and their logits.

    python tests/golden/make.py [name ...]

They represent files that users have, so existing ones are never overwritten. A change of the format
needs a new name in ``CASES`` (``ipq_2``); the old folders must still load.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_quantnoise import FixedPointConfig, IPQConfig, quantize_model

HERE = Path(__file__).parent
WORDS = 48
EXPECTED = "expected.safetensors"


def bert(layers=1, size=16):
    config = BertConfig(
        hidden_size=size, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32,
        vocab_size=WORDS, max_position_embeddings=16, type_vocab_size=1,
        initializer_range=0.5,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def gpt2():
    config = GPT2Config(
        n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=WORDS, initializer_range=0.5,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def resnet():
    """Return a model whose BatchNorm buffers differ from those of a new one."""
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3
    )
    model = ResNetForImageClassification(config).train()
    with torch.no_grad():
        model(pixel_values=images())
    return model


def vit():
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, num_labels=3, initializer_range=0.5,
    )  # fmt: skip
    return ViTForImageClassification(config)


def words():
    return torch.randint(0, WORDS, (2, 7), generator=torch.Generator().manual_seed(1))


def images():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


# Of releases before leftover_bits.
OLD = {"codebook_bits": 32, "leftover_bits": 32}
# name -> model, config
CASES = {
    "ipq": (bert, IPQConfig(n_centroids=8, **OLD)),
    "ipq_int8": (
        bert,
        IPQConfig(
            block_size={"ffn": 8, "embeddings": 8, "attention": 4},
            n_centroids=5,
            codebook_bits=8,
            row_scale=True,
            leftover_bits=32,
        ),
    ),
    "additive": (
        bert, IPQConfig(block_size=8, n_centroids=6, n_codebooks=2, codebook_bits=16,
                        leftover_bits=32),
    ),
    "fixed_point": (
        bert, FixedPointConfig(bits=4, observer="channel", activation_bits=8, leftover_bits=32)
    ),
    "tied": (gpt2, IPQConfig(n_centroids=8, codebook_bits=16, leftover_bits=32)),
    "row_groups": (
        gpt2,
        IPQConfig(
            n_centroids=8, codebook_bits=8, frequent_rows=16, rare_block_size=8, leftover_bits=32
        ),
    ),
    "shared": (
        lambda: bert(layers=4),
        IPQConfig(n_centroids=8, share_layers=2, prune_layers="every_other", **OLD),
    ),
    "conv": (resnet, IPQConfig(n_centroids=8, block_size=9, stages=["conv"], **OLD)),
    # Its packed tensors have other names in the file than in the model, as dense ones have.
    "renamed": (vit, IPQConfig(n_centroids=8, stages=["ffn", "attention"], **OLD)),
    # A pooler in 8 bits, and biases, norms and the classifier in float16.
    "leftovers": (lambda: bert(size=32), IPQConfig(n_centroids=8)),
}  # fmt: skip


def make(name):
    """Write the folder of a case: the checkpoint, inputs and their logits."""
    folder = HERE / name
    if folder.exists():
        print(f"{name} exists and is not overwritten")
        return
    torch.manual_seed(0)
    make_model, config = CASES[name]
    model = make_model().eval()
    inputs = {"pixel_values": images()} if name in ("conv", "renamed") else {"input_ids": words()}
    data = [inputs] if config.reads_data else None
    model = quantize_model(model, config, calibration_data=data, progress=False)
    model.save_pretrained(folder)
    with torch.no_grad():
        save_file({**inputs, "logits": model(**inputs).logits}, folder / EXPECTED)


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        make(name)
