"""Compressed models in formats that others run, without this package."""

from .aqlm import AqlmExport, export_aqlm

__all__ = ["AqlmExport", "export_aqlm"]
