"""Compressed models in formats that others run, without this package."""

from .aqlm import AqlmExport, export_aqlm
from .onnx_file import OnnxExport, export_onnx

__all__ = ["AqlmExport", "OnnxExport", "export_aqlm", "export_onnx"]
