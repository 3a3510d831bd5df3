"""Folders that transformers.js and optimum load.

    config.json               with "transformers.js_config": {"dtype": "fp32"}
    generation_config.json    of decoders
    tokenizer.json, ...       or preprocessor_config.json, of images and audio
    onnx/model.onnx           or model_int8.onnx, by dtype

A folder can have a file for each dtype, of the same model; the last one exported is the default.
"""

from __future__ import annotations

import os
from copy import deepcopy

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, logging

from ..files.durable import write_json
from ..files.reading import read_json
from ..hub.processing import processing_files, save_processing

logger = logging.get_logger(__name__)

# Fields of a config in which two exports of one model may differ. Earlier releases wrote some of
# them as they were before the model was saved, or as they were after it.
_NOT_OF_THE_MODEL = (
    "architectures", "dtype", "quantization_config", "transformers.js_config",
    "transformers_version",
)  # fmt: skip
# Name of a dtype in transformers.js -> suffix of the file.
SUFFIXES = {"fp32": "", "int8": "_int8"}


def onnx_path(dtype: str) -> str:
    """Return the path of the file of a dtype in a folder."""
    return os.path.join("onnx", f"model{SUFFIXES[dtype]}.onnx")


def save_companions(model: PreTrainedModel, part: str, dtype: str, folder: str) -> None:
    """Write everything but the graph: configs, tokenizer or processor.

    Args:
        model: the packed model.
        part: folder to write to.
        dtype: the dtype that transformers.js loads.
        folder: folder that ``part`` will be merged into.

    Raises:
        ValueError: if the folder has a graph of another dtype, and the config of another model.
    """
    _dense_config(model).save_pretrained(part)
    path = os.path.join(part, CONFIG_NAME)
    write_json(read_json(path) | {"transformers.js_config": {"dtype": dtype}}, path)
    _require_same_model(part, dtype, folder)
    if model.can_generate():
        model.generation_config.save_pretrained(part)
    save_processing(model, part, folder)
    names = {*processing_files(part), *processing_files(folder)}
    _write_preprocessor(part)
    if "tokenizer_config.json" in names and "tokenizer.json" not in names:
        logger.warning(
            "the tokenizer has no tokenizer.json, which transformers.js reads; run "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) on the export's folder"
        )


def _dense_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the config of a model as it is saved, without that of its quantization."""
    config = deepcopy(model.config)
    config.architectures = [type(model).__name__]
    for each in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        if each is not None:
            each.dtype = model.dtype
            vars(each).pop("quantization_config", None)
    return config


def _require_same_model(part: str, dtype: str, folder: str) -> None:
    """Raise a ``ValueError`` if a graph that stays in a folder is of another model."""
    config = os.path.join(folder, CONFIG_NAME)
    kept = [onnx_path(name) for name in SUFFIXES if name != dtype]
    kept = [path for path in kept if os.path.isfile(os.path.join(folder, path))]
    if not kept or not os.path.isfile(config):
        return
    old, new = (read_json(path) for path in (config, os.path.join(part, CONFIG_NAME)))
    if _of_the_model(old) != _of_the_model(new):
        raise ValueError(
            f"invalid folder {folder!r}: got one with {kept[0]} and the {CONFIG_NAME} of another "
            "model, expected an empty one or one with this model; choose another folder"
        )


def _of_the_model(config: dict) -> dict:
    """Return the fields of a config, and of those in it, that two exports of a model share."""
    return {
        name: _of_the_model(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in _NOT_OF_THE_MODEL
    }


def _write_preprocessor(folder: str) -> None:
    """Write the image processor or feature extractor of a processor to a separate file.

    transformers 5 writes both into one file, which transformers.js does not read.
    """
    path = os.path.join(folder, "processor_config.json")
    processor = read_json(path) if os.path.isfile(path) else {}
    for name in ("image_processor", "feature_extractor"):
        if name in processor:
            write_json(processor[name], os.path.join(folder, "preprocessor_config.json"))
