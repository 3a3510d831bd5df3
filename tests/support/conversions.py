"""Tiny models of the model types whose checkpoints transformers renames or converts."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, conversion_mapping
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Field of a config -> its tiny value: the first pattern that matches.
SIZES: list[tuple[str, int]] = [
    (r"vocab_size", 160),
    (r"(max_position|n_positions|max_source|max_target|context_length|max_seq)", 64),
    (r"(layer|layers|depth|blocks|stages)$|n_layer|num_(hidden_|encoder_|decoder_)?layers", 2),
    (r"first_k_dense|num_nextn|n_mtp|num_dense|mtp", 1),
    (r"n_shared_experts|num_shared", 1),
    (r"top_?k_group|n_group|num_groups?$|num_expert_groups?", 1),
    (r"experts_per_tok|num_selected|top_?k$|num_experts_per", 2),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"heads", 2),
    (r"(qk_nope|qk_rope|index_head|rope_head)_?(head_)?dim", 8),
    (r"head_dim|head_size", 16),
    (r"lora_rank|_rank", 16),
    (r"intermediate|ffn|ff_dim|mlp_dim|feed_forward|mlp_hidden", 64),
    (r"hidden_size|d_model|n_embd|embed_dim|hidden_dim|^dim$|width|projection_dim|"
     r"out_hidden_size|embedding_size|channels?$|^hidden$|d_state$", 32),
    (r"image_size|img_size", 32),
    (r"temporal_patch_size", 2),
    (r"patch_size", 8),
]  # fmt: skip
KEPT = re.compile(r"num_channels|in_channels|in_chans|kernel|stride|bits|type_vocab|label")
MAX_PARAMETERS = 4_000_000


def tiny_config(config_class: type[PreTrainedConfig], fields: dict | None = None) -> Any:
    """Return a config of a class with small sizes, by the names of its fields."""
    default = config_class().to_dict() if fields is None else fields
    return config_class(**_tiny_fields(config_class, default))


def _tiny_fields(config_class: Any, fields: dict[str, Any]) -> dict[str, Any]:
    tiny: dict[str, Any] = {}
    parts = getattr(config_class, "sub_configs", None) or {}
    for name, value in fields.items():
        if name in parts and isinstance(value, dict):
            part_class = CONFIG_MAPPING[value["model_type"]] if "model_type" in value else None
            if isinstance(part_class, type):
                tiny[name] = {**_tiny_fields(part_class, value), "model_type": value["model_type"]}
        elif name.endswith("token_id") or name.endswith("token_index"):
            if isinstance(value, int):
                tiny[name] = min(value, 150)
        elif not KEPT.search(name):
            size = next((size for pattern, size in SIZES if re.search(pattern, name)), None)
            if size is None or isinstance(value, bool):
                continue
            if isinstance(value, int):
                tiny[name] = min(value, size)
            elif isinstance(value, list) and value and all(type(v) is int for v in value):
                tiny[name] = [min(v, size) for v in value]
    return tiny


def classes_in_mapping() -> dict[str, list[str]]:
    """Return key of transformers' conversion mapping -> names of model classes it applies to."""
    conversion_mapping.get_checkpoint_conversion_mapping("bert")  # makes the cache
    known = conversion_mapping._checkpoint_conversion_mapping_cache
    classes: dict[str, list[str]] = {}
    for key in known:
        if key == "legacy":
            continue
        names: list[str] = []
        if key in CONFIG_MAPPING:
            for mapping in ("MODEL", "MODEL_FOR_CAUSAL_LM", "MODEL_FOR_MASKED_LM",
                            "MODEL_FOR_IMAGE_TEXT_TO_TEXT", "MODEL_FOR_MULTIMODAL_LM",
                            "MODEL_FOR_SEQUENCE_CLASSIFICATION", "MODEL_FOR_IMAGE_CLASSIFICATION",
                            "MODEL_FOR_OBJECT_DETECTION", "MODEL_FOR_SPEECH_SEQ_2_SEQ",
                            "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM"):  # fmt: skip
                found = getattr(modeling_auto, f"{mapping}_MAPPING_NAMES", {}).get(key)
                names += [found] if isinstance(found, str) else list(found or ())
        elif isinstance(getattr(transformers, key, None), type):
            names.append(key)
        classes[key] = list(dict.fromkeys(names))
    return classes


def build_tiny(name: str) -> PreTrainedModel:
    """Return a tiny random model of a class; raises whatever makes it impossible."""
    model_class = getattr(transformers, name)
    config = tiny_config(model_class.config_class)
    with torch.device("meta"):
        count = sum(tensor.numel() for tensor in model_class(config).parameters())
    if count > MAX_PARAMETERS:
        raise ValueError(f"{name} would have {count:,} parameters")
    torch.manual_seed(0)
    return model_class(config).eval()
