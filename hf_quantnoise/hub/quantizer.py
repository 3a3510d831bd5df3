"""The transformers quantizer that ``from_pretrained`` and ``save_pretrained`` call.

Loading: transformers creates the model on the meta device.
:meth:`_process_model_before_weight_loading` turns the layers of the plan into empty packed ones
(``skeleton.py``) and reads those that it can (``reading.py``); transformers reads the rest.
Saving: the state dict is the model's own, plus sentinels that make a load without this package fail
instead of starting from random weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from ..argument_checks import as_float_dtype, require_in_memory, require_instance
from ..batch_norm import warn_without_data
from ..compat import (
    DisableTorchFunction,
    has_adapter,
    is_initialized,
    mark_quantized,
    offloaded_names,
    set_table_of_prompts,
    stop_rescaling,
)
from ..configuration import QuantizedModelConfig
from ..files.reading import headers_of, tensors_in
from ..modeling import PackedLayer, packed_layers
from ..modeling.convert import decode_stored_states, unpack_model
from ..modeling.packed import PREFIX
from ..modeling.packer import ModelPacker
from ..modeling.structural_changes import declare_shared, tied_after_loading
from ..modeling.ties import restore_ties
from ..sharing import share, unshare
from .card import CARD_ATTRIBUTE, TAGS
from .conversions import convert_all, convert_dense_only, names_kept_in_files, without
from .file_check import check_files, require_valid_values
from .layers_match import match_plan_to_layers
from .parts import describe_parts, forget_parts
from .processing import remember_folder
from .reading import align, read_packed, release_files, require_no_renaming
from .saving import attach_saving, detach_saving, stored_state_dict
from .skeleton import (
    Names,
    allow_sentinels,
    build_skeleton,
    remove_placeholders,
    require_shapes,
    sentinel_names,
    shapes_before_loading,
)
from .weights_id import WEIGHTS_ID, id_of_weights, in_fixed_order, require_one_save

logger = logging.get_logger(__name__)


def _table_of_packed(model: PreTrainedModel) -> nn.Module | None:
    return model.get_input_embeddings() if any(packed_layers(model)) else None


set_table_of_prompts(_table_of_packed)


class QuantNoiseHfQuantizer(HfQuantizer):
    """Loads, saves and dequantizes models compressed by this package."""

    quantization_config: QuantizedModelConfig

    def __init__(self, quantization_config: QuantizedModelConfig, **kwargs: Any) -> None:
        kinds = "an IPQConfig or a FixedPointConfig"
        require_instance("quantization_config", quantization_config, QuantizedModelConfig, kinds)
        super().__init__(quantization_config, **kwargs)

    # ---- asked by transformers before it trains, saves or compiles -------------------------------

    def is_serializable(self) -> bool:
        return True

    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    # The default lists all names of the model, which takes time and changes nothing: a packed
    # layer's tensors are not split among devices.
    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None: ...

    def update_weight_conversions(self, weight_conversions: list, model: PreTrainedModel) -> list:
        """Return the conversions of names for the files that are being loaded."""
        kept = self.__dict__.pop("_kept", None)
        return without(weight_conversions, kept) if kept else weight_conversions

    def attach(self, model: PreTrainedModel) -> None:
        """Mark a model that was packed in memory as quantized."""
        config = self.quantization_config
        model.hf_quantizer = self
        model.is_quantized = True
        model.quantization_method = config.quant_method
        model.config.quantization_config = config
        _set_quantized(model, True)
        model.add_model_tags(list(TAGS))
        attach_saving(model)

    # ---- loading --------------------------------------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files=None, device_map=None, stored=None, **kwargs
    ) -> None:
        config = self.quantization_config
        remember_folder(model, checkpoint_files)
        if not self.pre_quantized:
            _require_no_data(config)
            return
        if not config.plan:
            raise ValueError(
                "invalid quantization_config: its plan is empty, so the storage of the layers is "
                "unknown; save the model again with save_pretrained"
            )
        allow_sentinels(model, config)
        stop_rescaling(model)
        # transformers intercepts every torch function here to create tensors on the meta device.
        with DisableTorchFunction():
            names, headers = Names(model), headers_of(checkpoint_files)
            stored = stored or tensors_in(headers)
            in_files = check_files(names, config, stored)
            require_one_save(headers, config.weights_id)
            skeleton = build_skeleton(names, config, in_files)
            self.quantization_config, layers, self._joined = skeleton
            self._shapes = shapes_before_loading(model)
            self._kept = names_kept_in_files(model, config, stored)
            self._read = read_packed(model, layers, headers, device_map, self._kept)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs):
        if not self.pre_quantized:
            require_in_memory(
                model.named_parameters(),
                "a weight must be in memory to be quantized; quantize without offloading, "
                "save_pretrained, and load the result with this device_map",
            )
            warn_without_data(model, "from_pretrained has no data; use quantize_model")
            model.is_quantized = False  # the packer takes dense models, and marks it
            ModelPacker(model, self.quantization_config).pack_all()
            release_files(model)
            return model
        require_no_renaming(model, self.__dict__.pop("_read"))
        require_shapes(model, self.__dict__.pop("_shapes"))
        remove_placeholders(model)
        model.add_model_tags(list(TAGS))
        attach_saving(model)
        for name, layer in packed_layers(model):
            is_read = layer._loading.is_read
            layer.finish_loading()
            if is_read:
                continue
            if _is_offloaded(layer) and layer.quantizer.encodes_state:
                raise _cannot_be_offloaded(name, "stores its centroids in 8 bits")
            self._require_read(name, layer)
        require_valid_values(model)
        decode_stored_states(model)
        self._tie_shared(model)
        align(model)
        return model

    def _require_read(self, name: str, layer: PackedLayer) -> None:
        """Raise ValueError if the checkpoint lacks a tensor of a layer."""
        for key, tensor in layer.tensors().items():
            is_read = key in offloaded_names(layer) if tensor.is_meta else is_initialized(tensor)
            if is_read:
                continue
            if name not in self._joined or key.startswith(PREFIX):
                raise ValueError(
                    f"the checkpoint lacks {name}.{key}, which is in its plan: a file is missing "
                    "or belongs to another model; download or save the model again"
                )
            nn.init.zeros_(tensor)  # the bias of a head that is not in the file

    def _tie_shared(self, model: PreTrainedModel) -> None:
        """Tie the shared layers that transformers must not tie (:func:`tied_after_loading`)."""
        shared = self.quantization_config.shared_layers
        if not (names := tied_after_loading(model, shared)):
            return
        for name in names:
            if _is_offloaded(model.get_submodule(name.rpartition(".")[0])):
                raise _cannot_be_offloaded(name, "is shared by layers")
        share(model, [(source, name) for name, source in shared.items()])
        declare_shared(model, shared)

    # ---- saving ---------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict]:
        # As after loading: otherwise the first config.json would differ from all later ones.
        for key in model.config.sub_configs:
            if (sub_config := getattr(model.config, key, None)) is not None:
                sub_config.dtype = model.dtype
        # With an adapter loaded, transformers writes only the adapter.
        if not has_adapter(model):
            match_plan_to_layers(model, self.quantization_config)
        state_dict = stored_state_dict(model, self.quantization_config)
        sentinels = sentinel_names(self.quantization_config, model)
        for name in sentinels:
            state_dict[name] = torch.zeros(1, dtype=torch.uint8)
        convert_dense_only(model, sentinels)
        if has_adapter(model):
            return state_dict, {}
        self.quantization_config.weights_id = weights_id = id_of_weights(model, state_dict)
        describe_parts(model, self.quantization_config)
        return in_fixed_order(state_dict), {WEIGHTS_ID: weights_id}

    # ---- dequantizing ---------------------------------------------------------------------------

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None):
        dtype = as_float_dtype(dtype)  # config.dtype is its name once the model was saved
        require_in_memory(
            model.named_parameters(),
            "a weight must be in memory to be dequantized; load the model without offloading",
        )
        unpack_model(model)
        detach_saving(model)
        convert_all(model)
        forget_parts(model)
        if dtype not in (None, model.dtype):  # otherwise each weight keeps the dtype it has
            for tensor in model.state_dict(keep_vars=True).values():
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
        model.__dict__.pop(CARD_ATTRIBUTE, None)  # its metrics are those of the packed model
        unshare(model, self.quantization_config.shared_layers)
        restore_ties(model)
        _set_quantized(model, False)
        return model


def _set_quantized(model: PreTrainedModel, value: bool) -> None:
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            mark_quantized(module.config, value)


def _require_no_data(config: QuantizedModelConfig) -> None:
    """Raise if a config needs more than the dense checkpoint that is being loaded."""
    call = "load the dense model without quantization_config and use quantize_model(model, config"
    data = "calibration_data=[batch, ...]"
    if config.reads_data:
        reason = f"{config.reads_data} needs data, and from_pretrained has none"
        raise ValueError(f"{reason}; {call}, {data}) or QuantNoiseTrainer")
    if config.target:
        reason = f"{config.target}: from_pretrained does not allocate bits"
        raise ValueError(f"{reason}; {call}), with {data} if there is data, or QuantNoiseTrainer")


def _is_offloaded(module: nn.Module) -> bool:
    """Return whether accelerate's hook holds a tensor of the module itself until it runs."""
    return any(tensor.is_meta for tensor in module.parameters(recurse=False))


def _cannot_be_offloaded(name: str, reason: str) -> ValueError:
    return ValueError(
        f"invalid device_map: {name} {reason}, so it cannot be offloaded; use a device_map that "
        "does not put it on 'disk' or 'cpu'"
    )
