"""Example inputs that an ONNX graph is traced with, and their dynamic axes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .onnx_cache import PAST

_TOKENS = {"input_ids", "attention_mask", "token_type_ids"}
# Inputs of models that read more than text, or more than pixels.
_OTHER_INPUTS = {
    *("bbox", "image", "image_embeds", "input_features", "input_ids", "input_values"),
    *("pixel_values", "visual_embeds", "visual_feats"),
}
# One second, for models that read waveforms.
_SAMPLES = 16_000


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a batch of two examples to trace the graph with."""
    config, parameters = model.config, inspect.signature(model.forward).parameters
    main = model.main_input_name
    if others := _OTHER_INPUTS & parameters.keys() - {main}:
        reason = (
            "which the graph of a decoder cannot; generate with the packed folder in transformers"
            if model.can_generate()
            else "and a graph has the inputs of its example batch only; pass one, "
            "inputs={name: tensor}"
        )
        also = f"{type(model).__name__} also takes {', '.join(sorted(others))}"
        raise ValueError(f"export_onnx: {also}, {reason}")
    if main == "input_ids":
        shape = (2, 2, 4) if type(model).__name__.endswith("ForMultipleChoice") else (2, 8)
        ids = (torch.arange(16) % config.vocab_size).view(shape)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "token_type_ids" in parameters and getattr(config, "type_vocab_size", 0) > 1:
            batch["token_type_ids"] = torch.zeros_like(ids)
        return {name: tensor.to(model.device) for name, tensor in batch.items()}
    if sizes := _shape_of_floats(model):
        return {main: torch.zeros(2, *sizes, device=model.device)}
    raise ValueError(
        f"export_onnx: the shape of {main} is not in the config of {type(model).__name__}; pass an "
        "example batch, inputs={name: tensor}"
    )


def _shape_of_floats(model: PreTrainedModel) -> tuple[int, ...] | None:
    """Return the shape of one image, spectrogram or waveform, or None if the config lacks it."""
    config, main = model.config, model.main_input_name
    size, channels, bands, frames, positions = (
        getattr(config, name, None)
        for name in (
            "image_size", "num_channels", "num_mel_bins", "max_length", "max_source_positions"
        )
    )  # fmt: skip
    if main == "pixel_values" and isinstance(size, int) and channels:
        return channels, size, size
    if main == "input_features" and bands and positions:
        return bands, 2 * positions  # Whisper, whose second convolution has stride 2
    if main == "input_values" and bands and frames:
        return frames, bands  # the audio spectrogram transformer
    return (_SAMPLES,) if main == "input_values" else None


def without_ones(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return example inputs whose dynamic axes have more than one element, by repeating those.

    torch.export takes a size of 1 as fixed, and the graph would only run on inputs of this size.
    """
    axes = dynamic_axes(inputs)
    sizes = (
        (label, inputs[name].shape[axis])
        for name, labels in axes.items()
        for axis, label in labels.items()
    )
    largest = dict(sorted(sizes))

    def repeated(name: str, tensor: Tensor) -> Tensor:
        for axis, label in axes[name].items():
            # An axis next to longer ones of its kind has one element for another reason.
            if tensor.shape[axis] == 1 and (axis == 0 or largest[label] == 1):
                tensor = tensor.repeat_interleave(max(2, largest[label]), axis)
        return tensor

    return {name: repeated(name, tensor) for name, tensor in inputs.items()}


def dynamic_axes(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Return the axes of each input that may have any size, with their names.

    transformers.js finds the batch axis of a cache by its name. onnxruntime takes axes of one name
    as equally long, so images beside texts have an own name for theirs (CLIP compares any number of
    both). If the model needs as many, the exporter uses one name.
    """
    axes = {name: _axes(name, tensor) for name, tensor in inputs.items()}
    has_past = any(name.startswith(PAST) for name in inputs)
    if not has_past and any(not tensor.is_floating_point() for tensor in inputs.values()):
        for name, tensor in inputs.items():
            if tensor.is_floating_point() and axes[name]:
                axes[name][0] = f"{name}_batch_size"
    if has_past:
        axes["attention_mask"] = {0: "batch_size", 1: "total_sequence_length"}
    return axes


def _axes(name: str, tensor: Tensor) -> dict[int, str]:
    if name.startswith(PAST):
        return {0: "batch_size", 2: "past_sequence_length"}
    if tensor.dim() == 0:
        return {}
    is_waveform = name == "input_values" and tensor.dim() == 2
    if tensor.dim() == 1 or (tensor.is_floating_point() and not is_waveform):
        return {0: "batch_size"}
    if tensor.dim() == 3 and name in _TOKENS:  # of multiple choice
        return {0: "batch_size", 1: "choices", 2: "sequence_length"}
    prefix = "decoder_" if name.startswith("decoder_") else ""
    return {0: "batch_size", 1: f"{prefix}sequence_length"}
