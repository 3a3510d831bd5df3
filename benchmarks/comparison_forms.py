"""Forms of a finetuned model for ``comparison.py``: how each is written to a folder and loaded."""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import peer_libraries
import torch
from comparison_checkpoints import Checkpoint
from comparison_onnx import (
    OnnxModel,
    load_onnx,
    write_onnx,
    write_onnx_int8,
    write_packed_onnx,
)
from glue_peers import METHODS
from speed import BASE, torch_int8
from torch import nn
from transformers import BitsAndBytesConfig

from hf_quantnoise import (
    IPQConfig,
    export_aqlm,
    optimize_for_inference,
    quantize_model,
)

WEIGHTS = "model.safetensors"
INSTALL = {
    "torchao": peer_libraries.INSTALL["torchao"],
    "optimum.quanto": peer_libraries.INSTALL["quanto"],
    "bitsandbytes": "pip install bitsandbytes==0.50.2",
    "onnxruntime": "pip install 'hf-quantnoise[onnx]'",
    "onnxscript": "pip install 'hf-quantnoise[onnx]'",
    "aqlm": "pip install 'hf-quantnoise[aqlm]'",
}


@dataclass(frozen=True)
class Form:
    """A way to store a model and to run it.

    Attributes:
        name: row of the table.
        load: returns the model of a folder, ready to run.
        write: writes what ``load`` needs into an empty folder; it gets the folder of ``start``.
            None: ``load`` reads the folder of ``start``.
        start: form that this one begins with; None: the float32 model.
        requires: modules of other packages.
        missing: why it cannot be measured.
    """

    name: str
    load: Callable[[Checkpoint, str], nn.Module] | None = None
    write: Callable[[Checkpoint, str, str], None] | None = None
    start: str | None = None
    requires: tuple[str, ...] = ()
    missing: str | None = None

    def missing_package(self) -> str | None:
        """Return what to install for this form, or None."""
        for module in self.requires:
            try:
                found = importlib.util.find_spec(module) is not None
            except ModuleNotFoundError:  # of the parent package
                found = False
            if not found:
                return f"needs {module}: {INSTALL[module]}"
        return None


def dense_matrices(original: nn.Module, loaded: nn.Module) -> dict[str, int]:
    """Return name -> values of the weights with two dimensions that a form holds in floating point.

    A weight is dense if the form has a floating-point tensor of its shape: under its name, or in an
    ONNX file, whose weights may be transposed and renamed, any one that no other weight matches.
    """
    matrices = {n: w for n, w in original.named_parameters() if w.dim() > 1}
    if not isinstance(loaded, OnnxModel):
        state = loaded.state_dict()
        plain = {n: t for n, t in state.items() if type(t) in (torch.Tensor, nn.Parameter)}
        return {
            name: weight.numel()
            for name, weight in matrices.items()
            if name in plain
            and plain[name].is_floating_point()
            and plain[name].shape == weight.shape
        }
    import onnx

    floating = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    shapes = Counter(
        tuple(sorted(tensor.dims))
        for tensor in onnx.load(loaded.path).graph.initializer
        if tensor.data_type in floating
    )
    found = {}
    for name, weight in matrices.items():
        shape = tuple(sorted(weight.shape))
        if shapes[shape]:
            shapes[shape] -= 1
            found[name] = weight.numel()
    return found


# ---- transformers and torch ----------------------------------------------------------------------


def write_dense(checkpoint: Checkpoint, folder: str, start: str, dtype=torch.float32) -> None:
    copy.deepcopy(checkpoint.dense).to(dtype).save_pretrained(folder)


def load_saved(checkpoint: Checkpoint, folder: str, **options) -> nn.Module:
    return checkpoint.auto_class.from_pretrained(folder, **options).eval()


def write_torch_int8(checkpoint: Checkpoint, folder: str, start: str) -> None:
    checkpoint.dense.config.save_pretrained(folder)
    torch.save(torch_int8(checkpoint.dense).state_dict(), os.path.join(folder, "model.pt"))


def load_torch_int8(checkpoint: Checkpoint, folder: str) -> nn.Module:
    model = torch_int8(peer_libraries.empty_model(folder))
    model.load_state_dict(torch.load(os.path.join(folder, "model.pt"), weights_only=True))
    return model.eval()


def write_bitsandbytes(checkpoint: Checkpoint, folder: str, start: str, **options) -> None:
    skipped = ["lm_head"]  # the default of Transformers
    if options.get("load_in_4bit"):  # its CPU kernel needs multiples of 32 outputs and 64 inputs
        layers = [(n, m) for n, m in checkpoint.dense.named_modules() if isinstance(m, nn.Linear)]
        skipped += [n for n, m in layers if m.out_features % 32 or m.in_features % 64]
    config = BitsAndBytesConfig(llm_int8_skip_modules=skipped, **options)
    load_saved(
        checkpoint, checkpoint.folder, quantization_config=config, device_map="cpu"
    ).save_pretrained(folder)


def load_bitsandbytes(checkpoint: Checkpoint, folder: str) -> nn.Module:
    # Each int8 layer would warn in each call that it computes in float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return load_saved(checkpoint, folder, device_map="cpu")


# ---- other libraries -----------------------------------------------------------------------------


def write_peer(
    checkpoint: Checkpoint, folder: str, start: str, library: str, options: dict
) -> None:
    checkpoint.dense.config.save_pretrained(folder)
    save = {"torchao": peer_libraries.save_torchao, "quanto": peer_libraries.save_quanto}[library]
    save(checkpoint.dense, os.path.join(folder, WEIGHTS), **options)


def load_peer(checkpoint: Checkpoint, folder: str, library: str) -> nn.Module:
    load = {"torchao": peer_libraries.load_torchao, "quanto": peer_libraries.load_quanto}[library]
    return load(peer_libraries.empty_model(folder), os.path.join(folder, WEIGHTS)).eval()


def peer_forms() -> list[Form]:
    """Return int8 and fewer bits of torchao and quanto, as ``glue_peers.py`` quantizes."""
    found = []
    for library, module, sizes in (
        ("torchao", "torchao", ("int8", "int4, groups of 32")),
        ("quanto", "optimum.quanto", ("int8", "int4, groups of 128", "int2, groups of 128")),
    ):
        for size in sizes:
            (options,) = (
                {name: value for name, value in setting.items() if name != "library"}
                for other, _, setting in METHODS
                if other == size and setting["library"] == library
            )
            write = partial(write_peer, library=library, options=options)
            load = partial(load_peer, library=library)
            name = f"{'optimum-' * (library == 'quanto')}{library} {size}"
            found.append(Form(name, load, write, requires=(module,)))
    return found


# ---- this package --------------------------------------------------------------------------------


def write_aqlm(checkpoint: Checkpoint, folder: str, start: str) -> None:
    """Write what this package finds in one shot, in AQLM's format."""
    config = IPQConfig(**checkpoint.aqlm, stages=["ffn", "attention"], seed=checkpoint.seed)
    small = quantize_model(copy.deepcopy(checkpoint.dense), config, progress=False)
    export_aqlm(small, folder)


def load_optimized(checkpoint: Checkpoint, folder: str) -> nn.Module:
    return optimize_for_inference(load_saved(checkpoint, folder), "int8")


def own_forms(size: str) -> list[Form]:
    """Return the forms of a packed model: as it is, optimized, and as ONNX files."""
    packed = f"packed {size}"
    int8 = partial(write_packed_onnx, dtype="int8", leftover_bits=16)
    onnx = ("onnxruntime", "onnxscript")
    return [
        Form(packed, load_saved, lambda checkpoint, folder, start: checkpoint.pack(size, folder)),
        Form(f'{packed}, optimized "int8"', load_optimized, start=packed),
        Form(f"{packed}, ONNX", load_onnx, write_packed_onnx, packed, onnx),
        Form(f"{packed}, ONNX int8", load_onnx, int8, packed, onnx),
    ]


def forms(sizes: tuple[str, ...]) -> list[Form]:
    """Return all forms; the float32 model comes first."""
    bf16 = torch.bfloat16
    bits8 = partial(write_bitsandbytes, load_in_8bit=True)
    nf4 = partial(
        write_bitsandbytes, load_in_4bit=True, bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    onnx = ("onnxruntime", "onnxscript")
    return [
        Form(BASE, partial(load_saved, dtype=torch.float32), write_dense),
        Form("dense bf16", partial(load_saved, dtype=bf16), partial(write_dense, dtype=bf16)),
        Form("torch dynamic int8", load_torch_int8, write_torch_int8),
        *peer_forms(),
        Form("bitsandbytes int8", load_bitsandbytes, bits8, requires=("bitsandbytes",)),
        Form("bitsandbytes nf4", load_bitsandbytes, nf4, requires=("bitsandbytes",)),
        Form("GGUF (llama.cpp)", missing="needs a build of llama.cpp"),
        Form("ONNX float32", load_onnx, write_onnx, requires=onnx),
        Form("ONNX dynamic int8", load_onnx, write_onnx_int8, "ONNX float32", onnx),
        Form("AQLM format", load_saved, write_aqlm, requires=("aqlm",)),
        *(form for size in sizes for form in own_forms(size)),
    ]
