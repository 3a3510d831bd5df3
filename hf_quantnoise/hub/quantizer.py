"""The transformers quantizer: what ``from_pretrained`` and ``save_pretrained`` call.

Loading: the model stands on the meta device; :meth:`_process_model_before_weight_loading` turns the
layers of the plan into empty packed layers, transformers reads the tensors straight into them.
Saving: the state dict is the model's own, plus sentinels that make a load without this package fail
instead of starting from random weights.
"""

from __future__ import annotations

import re
from copy import deepcopy

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from ..configuration import LAYER_KEYS, QUANT_METHOD, QuantizedModelConfig
from ..modeling import (
    pack_skeleton,
    packed_layers,
    packed_names,
    packed_shapes,
    read_states,
    unpack_model,
)
from ..modeling.packed import PREFIX, PackedLayer
from ..modeling.restructure import declare_shared, tied_late
from ..quantizers import quantizer_from_dict
from ..sharing import share, unshare
from ..structure import LayerInfo, find_layers
from .card import CARD_ATTRIBUTE, TAGS
from .offload import cannot_be_fetched, fetched, is_offloaded, require_in_memory, was_read
from .replaced import follow_replaced
from .ties import TieRewriter, restore_ties

logger = logging.get_logger(__name__)

register_quantization_config(QUANT_METHOD)(QuantizedModelConfig)


def entry_quantizer(entry: dict):
    """The quantizer that a plan's entry describes."""
    return quantizer_from_dict({k: v for k, v in entry.items() if k not in LAYER_KEYS})


def sentinel_names(config: QuantizedModelConfig, model: torch.nn.Module) -> list[str]:
    """Names of the one-byte tensors that stand in the file where weights were.

    One in each part of the model (a child of the base model, or a head), named as its first packed
    weight: there are classes that lack parts, ``GPT2Model`` the head, ``T5EncoderModel`` the
    decoder. First by name: JSON sorts the plan, so its order is not the order of the stages.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names: dict[str, str] = {}
    for name in sorted(config.plan):
        if "tied_to" not in config.plan[name]:
            part = name.removeprefix(prefix).partition(".")[0]
            names.setdefault(part, f"{name}.weight")
    return list(names.values())


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

    # ---- loading --------------------------------------------------------------------------------

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            _require_no_data(config)
            return
        if not config.is_compressed:
            raise ValueError(
                "quantization_config: its plan is empty, so the checkpoint does not say how its "
                "layers are stored; save the model with save_pretrained of hf_quantnoise"
            )
        _ignore_sentinels(model, config)
        layers = {layer.name: layer for layer in find_layers(model)}
        parameters = dict(model.named_parameters())
        stored = _plan_for(model, config.plan, layers)
        plan = _close_over_ties(dict(stored), model, layers)
        self._joined = plan.keys() - stored.keys()
        rewriter = TieRewriter(model)
        for name, entry in plan.items():
            pack_skeleton(layers[name].module, entry_quantizer(entry), entry.get("activation_bits"))
            layers[name].module._shape_only = True
        rewriter.rewrite(
            {name: packed_names(layers[name].module) for name in plan},
        )
        self.quantization_config = deepcopy(config)
        self.quantization_config.plan = plan
        names = _Names(model)  # others than before: those of packed tensors
        shared = {
            name: names.own(source) for name, source in names.of(config.shared_layers).items()
        }
        self.quantization_config.shared_layers = shared
        late = tied_late(model, shared)
        declare_shared(model, shared, without=late)
        model._keys_to_ignore_on_load_missing.update(f"^{re.escape(name)}$" for name in late)
        self.quantization_config.left_dense = {
            name: reason
            for name, reason in names.of(config.left_dense).items()
            if name in layers or name in parameters
        }

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs):
        if not self.pre_quantized:
            from .packer import ModelPacker  # it needs this module's class

            require_in_memory(model)
            model.is_quantized = False  # it is dense until now; packing marks it
            ModelPacker(model, self.quantization_config).pack_all()
            _own_memory(model)
            return model
        model.add_model_tags(list(TAGS))
        for name, layer in packed_layers(model):
            layer._shape_only = False
            if is_offloaded(layer) and layer.quantizer.is_stored_otherwise:
                raise cannot_be_fetched(name, "stores its centroids in 8 bits")
            self._require_read(name, layer)
        read_states(model)
        self._tie_late(model)
        _own_memory(model)
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
        """Ties what transformers would have spoilt; see :func:`tied_late`."""
        shared = self.quantization_config.shared_layers
        if not (late := tied_late(model, shared)):
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
            f"{config.target}: from_pretrained does not allot sizes to weights; {call}config), "
            "with calibration_data=[batch, ...] where there is data, or to QuantNoiseTrainer"
        )


@torch.no_grad()
def _own_memory(model: PreTrainedModel) -> None:
    """Copies what was read straight off a file, tensor by tensor.

    Such tensors are windows on the file: one of them keeps all of it in memory, the weights that
    were quantized while loading too. And they begin in the middle of a cache line, where matrix
    products take another path, whose last bits differ from the saved model's.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def attach(model: PreTrainedModel, config: QuantizedModelConfig) -> None:
    """Marks a model that was packed in memory as quantized, so that it saves and trains as one."""
    model.hf_quantizer = QuantNoiseHfQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.config.quantization_config = config
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True
    model.add_model_tags(list(TAGS))


def _ignore_sentinels(model: PreTrainedModel, config: QuantizedModelConfig) -> None:
    """Lets the sentinels lie in the file, named with or without the base model's prefix."""
    # The first files had one, in whatever part came first.
    for name in {*sentinel_names(config, model), f"{min(config.plan)}.weight"}:
        short = name.removeprefix(f"{model.base_model_prefix}.")
        model._keys_to_ignore_on_load_unexpected.add(rf"(^|\.){re.escape(short)}$")


class _Names:
    """Names of modules and parameters as they are in this class of a model: with or without the
    base model's prefix."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.prefix = f"{model.base_model_prefix}."
        self.known = {name for name, _ in model.named_modules()}
        self.known.update(name for name, _ in model.named_parameters())

    def own(self, name: str) -> str | None:
        """What a name of the checkpoint is called here; None where this class lacks it."""
        candidates = (name, name.removeprefix(self.prefix), self.prefix + name)
        return next((candidate for candidate in candidates if candidate in self.known), None)

    def of(self, entries: dict) -> dict:
        """Entries under the names they have here, without those that this class lacks."""
        found = ((self.own(name), entry) for name, entry in entries.items())
        return {name: entry for name, entry in found if name is not None}


def _plan_for(
    model: PreTrainedModel, plan: dict[str, dict], layers: dict[str, LayerInfo]
) -> dict[str, dict]:
    """The plan under this class's names, without the layers it lacks (another head)."""
    own, names = {}, _Names(model)
    for name, entry in names.of(plan).items():
        layer = layers.get(name)
        if layer is None:
            raise ValueError(f"the plan packs {name}, which is no layer that can be packed here")
        if (layer.rows, layer.columns) != (entry["rows"], entry["columns"]):
            logger.warning(
                f"{name} is {layer.rows} x {layer.columns} in this model but "
                f"{entry['rows']} x {entry['columns']} in the checkpoint: it starts anew, dense."
            )
            continue
        own[name] = {key: value for key, value in entry.items() if key != "tied_to"}
        if (partner := entry.get("tied_to")) is not None:
            own[name]["tied_to"] = names.own(partner) or partner
    return own


def _close_over_ties(
    plan: dict[str, dict], model: PreTrainedModel, layers: dict[str, LayerInfo]
) -> dict[str, dict]:
    """Adds the tied partners that the checkpoint's own class did not have (an LM head). What enters
    them was never measured, so it is not rounded."""
    for pair in model.all_tied_weights_keys.items():
        target, source = (name.removesuffix(".weight") for name in pair)
        for here, there in ((source, target), (target, source)):
            if here in plan and there in layers and there not in plan:
                plan[there] = {**plan[here], "tied_to": here}
                plan[there].pop("activation_bits", None)
    return plan
