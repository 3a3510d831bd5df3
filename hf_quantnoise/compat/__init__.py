"""Private names of torch, transformers, accelerate and peft, all of them in one place.

None of them is covered by a compatibility promise. ``tests/test_compat.py`` checks each against the
installed versions, and checks that no other file uses a private name of another library.

To support a new version, run those tests with it and fix what fails here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    revert_weight_conversion,
)
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.quantizers.quantizers_utils import should_convert_module

from .hooks import bind_hooked_forward, offloaded_names, undo_accelerate_prepare
from .peft import set_table_of_prompts
from .saving import check_before_saving

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = [
    "CacheLayerMixin",
    "GradientCheckpointingLayer",
    "WeightConverter",
    "WeightRenaming",
    "WeightTransform",
    "bind_hooked_forward",
    "check_before_saving",
    "get_model_conversion_mapping",
    "load_offloaded_parameter",
    "offloaded_names",
    "revert_weight_conversion",
    "set_table_of_prompts",
    "should_convert_module",
    "undo_accelerate_prepare",
]

# The versions in which every name below was seen: the oldest and the newest that are tested.
SEEN_IN = {
    "torch": ("2.13.0", "2.13.0"),
    "transformers": ("5.21.0", "5.23.0"),
    "accelerate": ("1.12.0", "1.15.0"),
}

# Private methods that the package or its users override, which only a subclass can define:
# class -> method -> parameters without self.
OVERRIDDEN = {
    "torch.nn.Module": {
        "_apply": ["fn", "recurse"],
        "_save_to_state_dict": ["destination", "prefix", "keep_vars"],
        "_load_from_state_dict": [
            *("state_dict", "prefix", "local_metadata", "strict"),
            *("missing_keys", "unexpected_keys", "error_msgs"),
        ],
    },
    "transformers.Trainer": {
        "_get_train_sampler": ["train_dataset"],
        "_init_training_state": [
            *("max_steps", "num_update_steps_per_epoch", "num_train_epochs"),
            *("resume_from_checkpoint", "trial"),
        ],
        "_load_optimizer_and_scheduler": ["checkpoint"],
        "_save": ["output_dir", "state_dict"],
    },
    "transformers.quantizers.HfQuantizer": {
        "_dequantize": ["model", "dtype"],
        "_process_model_after_weight_loading": ["model", "kwargs"],
        "_process_model_before_weight_loading": ["model", "kwargs"],
    },
}


# ---- torch ---------------------------------------------------------------------------------------

# `__torch_function__` of a Tensor subclass that computes as a plain tensor.
disabled_torch_function = torch._C._disabled_torch_function_impl
# Context manager that skips all torch function modes (`torch.device` contexts, for example).
DisableTorchFunction = torch._C.DisableTorchFunction


def wrapper_tensor(cls: Any, shape: Sequence[int], dtype: torch.dtype, device: Any) -> Any:
    """Return a tensor of a class with `__torch_dispatch__`, with a shape but without values."""
    return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)


def in_backward() -> bool:
    """Return whether autograd is running a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the mutable dict of a module's own parameters, past properties of the same name."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the mutable dict of a module's own buffers."""
    return module._buffers


def persistent_buffer_names(module: nn.Module) -> set[str]:
    """Return the names of a module's own buffers that its state dict contains."""
    return module._buffers.keys() - module._non_persistent_buffers_set


def conv_padding(layer: Any) -> list[int]:
    """Return a convolution's padding in the form that `F.pad` takes."""
    return layer._reversed_padding_repeated_twice


def without_compile_wrapper(model: nn.Module) -> nn.Module:
    """Return the model inside `torch.compile`'s wrapper, or the model itself."""
    return getattr(model, "_orig_mod", model)


# ---- transformers: models ------------------------------------------------------------------------


def ignored_if_missing(model: Any) -> set[str]:
    """Return the mutable set of patterns that a checkpoint need not contain."""
    return model._keys_to_ignore_on_load_missing


def ignored_if_unexpected(model: Any) -> set[str]:
    """Return the mutable set of patterns that a checkpoint may contain in addition."""
    return model._keys_to_ignore_on_load_unexpected


def ignored_on_save(model: nn.Module) -> set[str]:
    """Return the names of tensors that `save_pretrained` omits."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def weight_conversions(model: Any) -> list[WeightTransform]:
    """Return the renamings and conversions applied while a model was loaded."""
    return model._weight_conversions or []


def weight_conversions_on_save(model: PreTrainedModel) -> list[WeightTransform]:
    """Return the conversions that `save_pretrained` reverses."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # the model was not loaded: as in revert_weight_conversion
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [each for each in conversions if not isinstance(each, PrefixChange)]
    return conversions


def set_weight_conversions(model: Any, conversions: list[WeightTransform]) -> None:
    """Set the conversions that `save_pretrained` reverses."""
    model._weight_conversions = conversions


def dtype_plan(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the patterns of parameters that are loaded in another dtype."""
    return model._get_dtype_plan(dtype)


def from_config(model_class: Any, config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """Return a model with random weights."""
    return model_class._from_config(config, **kwargs)


def init_weights_function(model: PreTrainedModel) -> Any:
    """Return the function that initializes a model's modules, for its source code."""
    return type(model)._init_weights


def models_of(auto_class: Any) -> Mapping[type, type]:
    """Return the mapping from config class to model class of an auto class."""
    return auto_class._model_mapping


def classes_kept_together(model: nn.Module) -> list[str]:
    """Return the names of module classes that are not split over devices."""
    return list(getattr(model, "_no_split_modules", None) or ())


# Attribute that maps tied names to the name they share: on the class, or on one instance.
TIED_WEIGHTS = "_tied_weights_keys"


def is_initialized(loaded: Tensor | nn.Module) -> bool:
    """Return whether loading has set a tensor or module, so that it is not initialized again."""
    return getattr(loaded, "_is_hf_initialized", False)


def mark_initialized(loaded: Any, initialized: bool = True) -> None:
    """Mark a tensor or module as set, so that transformers does not initialize it."""
    loaded._is_hf_initialized = initialized


def has_adapter(model: PreTrainedModel) -> bool:
    """Return whether PEFT adapters were added by `model.add_adapter` or `load_adapter`."""
    return getattr(model, "_hf_peft_config_loaded", False)


def mark_quantized(config: PreTrainedConfig, quantized: bool) -> None:
    """Set whether transformers treats the model of a config as quantized."""
    config._is_quantized = quantized


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """Return the attention implementation of a config ("sdpa", "eager", ...)."""
    return config._attn_implementation


def set_attention_implementation(config: PreTrainedConfig, name: str | None) -> None:
    """Set a config's attention implementation without the checks of `set_attn_implementation`."""
    config._attn_implementation = name


def stop_rescaling(model: nn.Module) -> None:
    """Let RWKV compute with its weights as they are, in training and in evaluation.

    It divides weights in place when it is evaluated, against overflows of float16, and multiplies
    them when it is trained again. The weights of packed layers cannot be written to. The outputs
    are the same, as the hidden states are normalized in the end.
    """
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if not hasattr(module, "layers_are_rescaled"):
            continue
        if module.layers_are_rescaled:
            training, module.training = module.training, True
            module._rescale_layers()
            module.training = training
        module.config.rescale_every = 0


# ---- transformers: Trainer -----------------------------------------------------------------------


def prepare_inputs(trainer: Trainer, batch: Any) -> dict[str, Any]:
    """Return a batch on the trainer's device, as its training steps receive it."""
    return trainer._prepare_inputs(batch)


def count_labels(trainer: Trainer, batch: Any) -> Tensor | int | None:
    """Return what a ``compute_loss_func`` is passed for a batch, by the rule for shifted labels.

    None if the loss does not take a number of labels.
    """
    return trainer._get_num_items_in_batch([batch], trainer.args.device)


def finish_current_push(trainer: Trainer) -> None:
    """Wait for an upload that is in progress."""
    trainer._finish_current_push()
