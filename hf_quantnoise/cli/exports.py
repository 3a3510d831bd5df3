"""Formats of ``hf-quantnoise convert`` for other software."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..export import export_aqlm, export_onnx
from .convert import TARGETS


@TARGETS.register("aqlm")
def to_aqlm(model: PreTrainedModel, folder: str) -> None:
    """for transformers with aqlm installed; layers that do not fit its layout are written dense"""
    for name, reason in export_aqlm(model, folder).dense.items():
        print(f"{name}: dense, {reason}")


@TARGETS.register("onnx")
def to_onnx(model: PreTrainedModel, folder: str) -> None:
    """a packed model.onnx for onnxruntime; encoders and classifiers only"""
    export_onnx(model, folder)
