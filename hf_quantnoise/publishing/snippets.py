"""The code on a model card that loads and runs the model."""

from __future__ import annotations

import json

from transformers import PreTrainedModel

from .tasks import TASKS, auto_class_of, auto_class_of_code

_SENTENCE = '"The film was a pleasant surprise."'
_IMAGE = 'Image.new("RGB", (224, 224))  # or Image.open("picture.jpg")'
# Task of the Hub -> arguments of its pipeline.
_CALLS = {
    "text-classification": _SENTENCE,
    "token-classification": '"Angela Fan works in Paris."',
    "fill-mask": 'f"Paris is the {pipe.tokenizer.mask_token} of France."',
    "text-generation": '"Once upon a time", max_new_tokens=20',
    "feature-extraction": _SENTENCE,
    "image-classification": "image",
}
# Main input of a model -> argument of a pipeline, and class, for what prepares it.
_PROCESSING = {
    "input_ids": ("tokenizer", "AutoTokenizer"),
    "pixel_values": ("image_processor", "AutoImageProcessor"),
}


def usage_snippet(model: PreTrainedModel, repo: str, processing: str | None, packed: bool) -> str:
    """Return Python code that runs a model in a pipeline, or loads it if its task has no example.

    Args:
        model: the model.
        repo: the repository or folder to load it from.
        processing: that of its tokenizer or image processor; None if there is none.
        packed: whether the model is packed, so that the code must import this package.
    """
    lines = ["import hf_quantnoise  # registers the format with transformers"] if packed else []
    auto = auto_class_of(model)
    trust = ", trust_remote_code=True" if auto_class_of_code(model) else ""
    task = TASKS.get(auto or "")
    argument, prepares = _PROCESSING.get(model.main_input_name, ("", ""))
    if processing is None:
        argument = ""
    if task in _CALLS and argument:
        uses_image = argument == "image_processor"
        lines += ["from PIL import Image"] if uses_image else []
        other = f", {argument}={json.dumps(processing)}" if processing != repo else ""
        lines += ["from transformers import pipeline", ""]
        lines += [f'pipe = pipeline("{task}", model={json.dumps(repo)}{other}{trust})']
        lines += [f"image = {_IMAGE}"] if uses_image else []
        return "\n".join([*lines, f"print(pipe({_CALLS[task]}))"])
    name = auto or ("AutoQuantizedModel" if packed else type(model).__name__)
    classes = [name, prepares] if argument else [name]
    if name == "AutoQuantizedModel":
        lines = [f"from hf_quantnoise import {classes.pop(0)}"]
    lines += [f"from transformers import {', '.join(sorted(classes))}"] if classes else []
    lines += ["", f"model = {name}.from_pretrained({json.dumps(repo)}{trust})"]
    if argument:
        lines += [f"{argument} = {prepares}.from_pretrained({json.dumps(processing)})"]
    return "\n".join(lines)
