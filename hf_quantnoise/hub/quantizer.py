"""The transformers quantizer that ``from_pretrained`` and ``save_pretrained`` call.

Loading: transformers creates the model on the meta device.
:meth:`_process_model_before_weight_loading` turns the layers of the plan into empty packed ones
(``skeleton.py``) and reads those that it can (``reading.py``); transformers reads the rest.
Saving: the state dict is the model's own, plus sentinels that make a load without this package fail
instead of starting from random weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from ..compat import DisableTorchFunction, has_adapter, mark_quantized, own_parameters
from ..configuration import QUANT_METHOD, QuantizedModelConfig
from ..modeling import (
    PackedLayer,
    decode_stored_states,
    packed_layers,
    packed_shapes,
    stored_tensors,
    unpack_model,
)
from ..modeling.packed import PREFIX
from ..modeling.packer import ModelPacker
from ..modeling.structural_changes import declare_shared, tied_after_loading
from ..modeling.ties import restore_ties
from ..sharing import share, unshare
from .card import CARD_ATTRIBUTE, TAGS
from .offload import cannot_be_fetched, fetched, is_offloaded, require_in_memory, was_read
from .reading import read_packed, require_no_renaming
from .replaced_layers import drop_replaced_layers
from .skeleton import (
    allow_sentinels,
    build_skeleton,
    dense_shapes,
    require_shapes,
    sentinel_names,
)

register_quantization_config(QUANT_METHOD)(QuantizedModelConfig)


@register_quantizer(QUANT_METHOD)
class QuantNoiseHfQuantizer(HfQuantizer):
    """Loads, saves and dequantizes models compressed by this package."""

    quantization_config: QuantizedModelConfig

    # ---- asked by transformers before it trains, saves or compiles -------------------------------

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    # The defaults of these two list all names of the model, which takes time and changes nothing: a
    # packed layer's tensors have the same names in files, and are not split among devices.

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Leave the plan unchanged."""

    def update_weight_conversions(self, weight_conversions: list, model: PreTrainedModel) -> list:
        """Return the conversions unchanged."""
        return weight_conversions

    def attach(self, model: PreTrainedModel) -> None:
        """Mark a model that was packed in memory as quantized."""
        config = self.quantization_config
        model.hf_quantizer = self
        model.is_quantized = True
        model.quantization_method = config.quant_method
        model.config.quantization_config = config
        _set_quantized(model, True)
        model.add_model_tags(list(TAGS))

    # ---- loading --------------------------------------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files=None, device_map=None, **kwargs
    ) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            _require_no_data(config)
            return
        if not config.plan:
            raise ValueError(
                "invalid quantization_config: its plan is empty, so the storage of the layers is "
                "unknown; save the model again with save_pretrained"
            )
        allow_sentinels(model, config)
        # transformers intercepts every torch function here to create tensors on the meta device.
        with DisableTorchFunction():
            self.quantization_config, layers, self._joined = build_skeleton(model, config)
            self._shapes = dense_shapes(model)
            self._read = read_packed(model, layers, checkpoint_files, device_map)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs):
        if not self.pre_quantized:
            require_in_memory(model)
            model.is_quantized = False  # the packer takes dense models, and marks it
            ModelPacker(model, self.quantization_config).pack_all()
            _release_files(model)
            return model
        require_no_renaming(model, self.__dict__.pop("_read"))
        require_shapes(model, self.__dict__.pop("_shapes"))
        model.add_model_tags(list(TAGS))
        for name, layer in packed_layers(model):
            is_read, layer._loading = layer._loading.is_read, None
            if is_read:
                continue
            if is_offloaded(layer) and layer.quantizer.encodes_state:
                raise cannot_be_fetched(name, "stores its centroids in 8 bits")
            self._require_read(name, layer)
        decode_stored_states(model)
        self._tie_shared(model)
        _align(model)
        return model

    def _require_read(self, name: str, layer: PackedLayer) -> None:
        """Raise if the checkpoint lacks a tensor of a layer, or has one of another shape."""
        shapes = packed_shapes(layer.quantizer, layer.rows, layer.columns)
        hint = "a file is missing or belongs to another model; download or save the model again"
        for tensor_name, tensor in layer.named_parameters(recurse=False):
            if was_read(layer, tensor_name):
                # transformers checks this from 5.23 on, with an error of this type.
                if tensor.shape != shapes.get(tensor_name, tensor.shape):
                    raise RuntimeError(
                        f"size mismatch for {name}.{tensor_name}: {tuple(tensor.shape)} in the "
                        f"checkpoint, {shapes[tensor_name]} in the plan: {hint}"
                    )
            elif name in self._joined and not tensor_name.startswith(PREFIX):
                torch.nn.init.zeros_(tensor)  # the bias of a head that is not in the file
            else:
                raise ValueError(
                    f"the checkpoint lacks {name}.{tensor_name}, which is in its plan: {hint}"
                )

    def _tie_shared(self, model: PreTrainedModel) -> None:
        """Tie the shared layers that transformers must not tie (:func:`tied_after_loading`)."""
        shared = self.quantization_config.shared_layers
        if not (names := tied_after_loading(model, shared)):
            return
        for name in names:
            if is_offloaded(model.get_submodule(name.rpartition(".")[0])):
                raise cannot_be_fetched(name, "is shared by layers")
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
            drop_replaced_layers(model, self.quantization_config)
        state_dict = model.state_dict()
        written: dict[int, Tensor] = {}  # tied layers must keep sharing one tensor
        for prefix, layer in packed_layers(model):
            keys = {name: f"{prefix}.{name}" for name, _ in layer.named_parameters(recurse=False)}
            tensors = {name: fetched(model, key, state_dict[key]) for name, key in keys.items()}
            for name, tensor in stored_tensors(layer, tensors).items():
                identity = id(own_parameters(layer)[name])
                state_dict[keys[name]] = written.setdefault(identity, tensor)
        for name in sentinel_names(self.quantization_config, model):
            state_dict[name] = torch.zeros(1, dtype=torch.uint8)
        return state_dict, {}

    # ---- dequantizing ---------------------------------------------------------------------------

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None):
        if isinstance(dtype, str):  # config.dtype is its name once the model was saved
            dtype = getattr(torch, dtype)
        unpack_model(model)
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
    call = "load the dense model without quantization_config and use quantize_model(model, "
    if config.reads_data:
        raise ValueError(
            f"{config.reads_data} needs data, and from_pretrained has none; {call}config, "
            "calibration_data=[batch, ...]) or QuantNoiseTrainer"
        )
    if config.target:
        raise ValueError(
            f"{config.target}: from_pretrained does not allocate bits; {call}config), with "
            "calibration_data=[batch, ...] if there is data, or QuantNoiseTrainer"
        )


@torch.no_grad()
def _release_files(model: PreTrainedModel) -> None:
    """Copy tensors that are views of a memory-mapped file, which would keep all of it in memory."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


# Bytes of a cache line, and of the widest vectors of a processor.
LINE = 64


@torch.no_grad()
def _align(model: PreTrainedModel) -> None:
    """Copy dense matrices that are not aligned to a cache line, as views of a file may be.

    Products take another code path for these, whose last bits differ from the saved model's. Tables
    and packed weights are copied when they are used, so their alignment does not matter.
    """
    for module in model.modules():
        if isinstance(module, PackedLayer | nn.Embedding):
            continue
        for parameter in own_parameters(module).values():
            if parameter is None or parameter.dim() < 2 or parameter.device.type != "cpu":
                continue
            if parameter.data_ptr() % LINE:
                parameter.data = parameter.data.clone()
