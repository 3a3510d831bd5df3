"""Forms of ``hf-quantnoise convert`` that other software runs."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..export import export_aqlm, export_onnx
from .convert import TARGETS


@TARGETS.register("aqlm")
def to_aqlm(model: PreTrainedModel, folder: str) -> None:
    """for transformers with aqlm; layers that do not fit its layout are written dense"""
    done = export_aqlm(model, folder)
    for name, reason in done.dense.items():
        print(f"{name}: dense, {reason}")


@TARGETS.register("onnx")
def to_onnx(model: PreTrainedModel, folder: str) -> None:
    """one packed model.onnx, for onnxruntime; encoders and classifiers"""
    export_onnx(model, folder)
