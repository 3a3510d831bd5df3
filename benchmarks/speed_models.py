"""The models and layers of ``speed.py``, with random weights, and their variants."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from hf_quantnoise import IPQConfig, optimize_for_inference, quantize_model
from hf_quantnoise.modeling import pack_layer, packed_layers
from hf_quantnoise.modeling.kernels import KERNELS
from hf_quantnoise.quantizers import ProductQuantizer

BASE = "dense float32"
LINEAR, ROWS, BLOCKS = (768, 3072), (1, 4, 8, 16, 64, 512), (4, 8)
FORMS = ("float32", "bf16", "int8")
SHAPES = {"minilm": ("1x16", "1x128", "32x128"), "tiny": ("1x8",)}


@dataclass(frozen=True)
class Subject:
    """A model or layer to measure.

    Attributes:
        build: returns it, dense and with random weights.
        pack: packs it in place; with True in integers, for int8 products.
        run: runs it once.
        per_run: units of work of a run (generated tokens), by which its time is divided.
    """

    build: Callable[[], nn.Module]
    pack: Callable[[nn.Module, bool], None]
    run: Callable[[nn.Module], object]
    per_run: int = 1


def linear(rows: int, block_size: int) -> Subject:
    """Return a Linear on some rows of inputs."""
    inputs = torch.randn(rows, LINEAR[0])

    def pack(model: nn.Module, integers: bool) -> None:
        bits = 8 if integers else 16
        quantizer = ProductQuantizer(block_size, 256, bits, n_iter=1)
        pack_layer(model[0], quantizer, activation_bits=8 if integers else None)
        if integers:
            model[0].input_scale.fill_(8 / 255)
            model[0].input_zero_point.fill_(128)

    def run(model: nn.Module) -> object:
        dtype = next((tensor.dtype for tensor in model.parameters()), torch.float32)
        return model(inputs.to(dtype))

    return Subject(lambda: nn.Sequential(nn.Linear(*LINEAR)), pack, run)


def pack_model(model: nn.Module, integers: bool) -> None:
    """Pack a model with the default blocks: 8 values in the FFN and tables, 4 in attention."""
    n_centroids = 256 if model.config.vocab_size > 1000 else 16
    config = IPQConfig(n_centroids=n_centroids, kmeans_iter=1)
    data = None
    if integers:
        config.codebook_bits, config.activation_bits = 8, 8
        data = [{"input_ids": torch.randint(5, model.config.vocab_size, (4, 32))}]
    quantize_model(model, config, calibration_data=data, progress=False)


def encoder(name: str, shape: str) -> Subject:
    """Return a BERT classifier on (batch x length) random tokens."""
    sizes = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
    if name == "tiny":
        sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64,
                 "vocab_size": 512}  # fmt: skip
    config = BertConfig(num_hidden_layers=6 if name == "minilm" else 1, **sizes)
    batch, length = map(int, shape.split("x"))
    ids = torch.randint(5, config.vocab_size, (batch, length))
    return Subject(
        lambda: BertForSequenceClassification(config), pack_model, lambda model: model(ids)
    )


def gpt2(tokens: int) -> Subject:
    """Return a GPT-2 shape that generates some tokens, one by one, after 16 others."""
    config = GPT2Config(n_layer=6, n_embd=512, n_head=8)
    ids = torch.randint(5, config.vocab_size, (1, 16))
    options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens}

    def run(model: nn.Module) -> object:
        return model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)

    return Subject(lambda: GPT2LMHeadModel(config), pack_model, run, tokens)


def cases(names: list[str]) -> dict[str, Callable[[], Subject]]:
    """Return the cases of the named groups."""
    found: dict[str, Callable[[], Subject]] = {}
    for name in names:
        if name == "linear":
            for block_size in BLOCKS:
                for rows in ROWS:
                    label = f"Linear {LINEAR[0]} x {LINEAR[1]}, blocks of {block_size}, {rows} rows"
                    found[label] = lambda rows=rows, block_size=block_size: linear(rows, block_size)
        elif name == "gpt2":
            found["GPT-2 (6 x 512), per generated token"] = lambda: gpt2(16)
        else:
            for shape in SHAPES[name]:
                label = f"{'MiniLM' if name == 'minilm' else name}, {shape} tokens"
                found[label] = lambda name=name, shape=shape: encoder(name, shape)
    return found


def torch_int8(model: nn.Module) -> nn.Module:
    """Return a dense model with torch's dynamic int8 layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def without(model: nn.Module, *kernels: str) -> nn.Module:
    """Return a copy of a packed model that does not use some kernels."""
    model = copy.deepcopy(model)
    for _, layer in packed_layers(model):
        layer.kernels = [name for name in layer.kernels if name not in kernels]
    return model


def variants(subject: Subject, seed: int) -> dict[str, nn.Module]:
    """Return the models to compare, by name; the dense one comes first."""
    torch.manual_seed(seed)
    dense = subject.build().eval()
    packed, integers = copy.deepcopy(dense), copy.deepcopy(dense)
    subject.pack(packed, False)
    subject.pack(integers, True)
    found = {
        BASE: dense,
        "dense bf16": copy.deepcopy(dense).to(torch.bfloat16),
        "torch dynamic int8": torch_int8(dense),
        "packed, decode only": without(packed, *KERNELS),
        "packed": without(packed, "compiled"),
        "packed, cpu extra": packed,
        "packed, bf16": without(packed, "compiled").to(torch.bfloat16),
        "packed, int8": without(integers, "compiled"),
        "packed, int8, cpu extra": integers,
    }
    for form in FORMS:
        found[f'optimized, "{form}"'] = optimize_for_inference(copy.deepcopy(packed), form)
    return {name: model.eval() for name, model in found.items()}


def tensors_of(model: nn.Module) -> list[torch.Tensor]:
    """Return the tensors of a model in memory, tied ones once; torch's int8 weights are hidden."""
    found = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        if hasattr(module, "_packed_params") and callable(getattr(module, "weight", None)):
            found[id(module)] = module.weight()
        elif isinstance(getattr(module, "dense_weight", None), torch.ScriptObject):
            found[id(module)] = torch.ops.quantized.linear_unpack(module.dense_weight)[0]
    return list(found.values())
