"""Bit allocation: how each weight is stored so that the file meets a target size."""
