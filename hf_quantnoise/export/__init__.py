"""Export of packed models to formats that load without this package."""

from .aqlm import AqlmExport, export_aqlm
from .onnx_file import OnnxExport, export_onnx

__all__ = ["AqlmExport", "OnnxExport", "export_aqlm", "export_onnx"]
