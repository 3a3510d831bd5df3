"""The transformers quantizer: what ``from_pretrained`` and ``save_pretrained`` call.

Loading: the model stands on the meta device; :meth:`_process_model_before_weight_loading` turns the
layers of the plan into empty packed ones (``skeleton.py``) and reads those that it can
(``reading.py``); transformers reads the rest straight into the model.
Saving: the state dict is the model's own, plus sentinels that make a load without this package fail
instead of starting from random weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from ..configuration import QUANT_METHOD, QuantizedModelConfig
from ..modeling import PackedLayer, packed_layers, packed_shapes, read_states, unpack_model
from ..modeling.packed import PREFIX
from ..modeling.packer import ModelPacker
from ..modeling.structural_changes import declare_shared, tied_after_loading
from ..modeling.ties import restore_ties
from ..sharing import share, unshare
from .card import CARD_ATTRIBUTE, TAGS
from .offload import cannot_be_fetched, fetched, is_offloaded, require_in_memory, was_read
from .reading import read_packed, require_own_names
from .replaced import follow_replaced
from .skeleton import (
    build_skeleton,
    dense_shapes,
    ignore_sentinels,
    require_shapes,
    sentinel_names,
)

register_quantization_config(QUANT_METHOD)(QuantizedModelConfig)


def storage_tensor(module: PackedLayer, name: str, tensor: Tensor) -> Tensor:
    """A packed layer's tensor as it is written; those that are no state of its quantizer as they
    are."""
    key = name.removeprefix(PREFIX)
    if name == key or key not in module.quantizer.state_spec(module.rows, module.columns):
        return tensor
    return module.quantizer.to_storage(key, tensor, module.state)


@register_quantizer(QUANT_METHOD)
class QuantNoiseHfQuantizer(HfQuantizer):
    """Reads, writes and dequantizes models compressed by this package."""

    quantization_config: QuantizedModelConfig

    # ---- what transformers asks before it trains, saves or compiles -----------------------------

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

    # transformers would list all names of the model, in search of those of `serialized_names`: a
    # packed layer's tensors have no other names in files, nor are they divided among devices.

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """The plan stays as it is."""

    def update_weight_conversions(self, weight_conversions: list, model: PreTrainedModel) -> list:
        """They stay as they are."""
        return weight_conversions

    def attach(self, model: PreTrainedModel) -> None:
        """Mark a model that was packed in memory as quantized, so that it saves and trains."""
        config = self.quantization_config
        model.hf_quantizer = self
        model.is_quantized = True
        model.quantization_method = config.quant_method
        model.config.quantization_config = config
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = True
        model.add_model_tags(list(TAGS))

    # ---- loading --------------------------------------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files=None, device_map=None, **kwargs
    ) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            _require_no_data(config)
            return
        if not config.is_compressed:
            raise ValueError(
                "quantization_config: its plan is empty, so the checkpoint does not say how its "
                "layers are stored; save the model with save_pretrained of hf_quantnoise"
            )
        ignore_sentinels(model, config)
        # transformers is making everything on the meta device, which costs more than it does here.
        with torch._C.DisableTorchFunction():
            self.quantization_config, layers, self._joined = build_skeleton(model, config)
            self._shapes = dense_shapes(model)
            self._read = read_packed(model, layers, checkpoint_files, device_map)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs):
        if not self.pre_quantized:
            require_in_memory(model)
            model.is_quantized = False  # it is dense until now; packing marks it
            ModelPacker(model, self.quantization_config).pack_all()
            _own_memory(model)
            return model
        require_own_names(model, self.__dict__.pop("_read"))
        require_shapes(model, self.__dict__.pop("_shapes"))
        model.add_model_tags(list(TAGS))
        for name, layer in packed_layers(model):
            layer._shape_only = False
            if layer._is_read:
                del layer._is_read
                continue
            if is_offloaded(layer) and layer.quantizer.is_stored_otherwise:
                raise cannot_be_fetched(name, "stores its centroids in 8 bits")
            self._require_read(name, layer)
        read_states(model)
        self._tie_late(model)
        _align(model)
        return model

    def _require_read(self, name: str, layer: PackedLayer) -> None:
        """Raises where the checkpoint lacks a tensor of a layer, or has one of another shape."""
        shapes = packed_shapes(layer.quantizer, layer.rows, layer.columns)
        again = "a file is missing or from another model. Download or save the model again"
        for tensor_name, tensor in layer.named_parameters(recurse=False):
            if was_read(layer, tensor_name):
                # transformers sees to this from 5.23 on, with an error of this type.
                if tensor.shape != shapes.get(tensor_name, tensor.shape):
                    raise RuntimeError(
                        f"size mismatch for {name}.{tensor_name}: {tuple(tensor.shape)} in the "
                        f"checkpoint, {shapes[tensor_name]} by its plan: {again}"
                    )
            elif name in self._joined and not tensor_name.startswith(PREFIX):
                torch.nn.init.zeros_(tensor)  # the bias of a head that the file never had
            else:
                raise ValueError(
                    f"the checkpoint lacks {name}.{tensor_name}, which its plan names: {again}"
                )

    def _tie_late(self, model: PreTrainedModel) -> None:
        """Ties what transformers would have spoilt; see :func:`tied_after_loading`."""
        shared = self.quantization_config.shared_layers
        if not (late := tied_after_loading(model, shared)):
            return
        for name in late:
            if is_offloaded(model.get_submodule(name.rpartition(".")[0])):
                raise cannot_be_fetched(name, "is shared by layers")
        share(model, [(source, name) for name, source in shared.items()])
        declare_shared(model, shared)

    # ---- saving ---------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict]:
        # As after loading: else the first config.json would differ from all later ones.
        for key in model.config.sub_configs:
            if (sub_config := getattr(model.config, key, None)) is not None:
                sub_config.dtype = model.dtype
        # With an adapter inside, transformers writes that alone, and neither config nor layers.
        if not getattr(model, "_hf_peft_config_loaded", False):
            follow_replaced(model, self.quantization_config)
        state_dict = model.state_dict()
        written: dict[int, Tensor] = {}  # tied layers must go on sharing one tensor
        for prefix, layer in packed_layers(model):
            for name, parameter in layer.named_parameters(recurse=False):
                key = f"{prefix}.{name}"
                if id(parameter) not in written:
                    tensor = fetched(model, key, state_dict[key])
                    written[id(parameter)] = storage_tensor(layer, name, tensor)
                state_dict[key] = written[id(parameter)]
        for name in sentinel_names(self.quantization_config, model):
            state_dict[name] = torch.zeros(1, dtype=torch.uint8)
        return state_dict, {}

    # ---- back to a plain model ------------------------------------------------------------------

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None):
        if isinstance(dtype, str):  # config.dtype is its name once the model was saved
            dtype = getattr(torch, dtype)
        unpack_model(model)
        if dtype not in (None, model.dtype):  # else each weight keeps what it was loaded in
            for tensor in model.state_dict(keep_vars=True).values():
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
        model.__dict__.pop(CARD_ATTRIBUTE, None)  # its metrics are the packed model's
        unshare(model, self.quantization_config.shared_layers)
        restore_ties(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False
        return model


def _require_no_data(config: QuantizedModelConfig) -> None:
    """Refuses what cannot be done while a dense checkpoint is loaded."""
    call = "load the dense model without quantization_config and give it to quantize_model(model, "
    if config.reads_data:
        raise ValueError(
            f"{config.reads_data}: from_pretrained has no data to measure on; {call}config, "
            "calibration_data=[batch, ...]), or to QuantNoiseTrainer"
        )
    if config.target:
        raise ValueError(
            f"{config.target}: from_pretrained does not allocate bits; {call}config), "
            "with calibration_data=[batch, ...] where there is data, or to QuantNoiseTrainer"
        )


@torch.no_grad()
def _own_memory(model: PreTrainedModel) -> None:
    """Copies what was read straight off a file, tensor by tensor: such tensors are windows on the
    file, and one of them keeps all of it in memory, the weights that were quantized too."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


# Bytes of a cache line, and of the widest vectors of a processor.
LINE = 64


@torch.no_grad()
def _align(model: PreTrainedModel) -> None:
    """Copies those dense matrices that begin in the middle of a cache line, as a window on a file
    may: products take another path there, whose last bits differ from the saved model's. What is
    looked up or decoded is copied on the way, and may begin anywhere."""
    for module in model.modules():
        if isinstance(module, PackedLayer | nn.Embedding):
            continue
        for parameter in module._parameters.values():
            if parameter is None or parameter.dim() < 2 or parameter.device.type != "cpu":
                continue
            if parameter.data_ptr() % LINE:
                parameter.data = parameter.data.clone()
