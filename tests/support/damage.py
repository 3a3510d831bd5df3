"""Changes to saved models: what a careless edit or a stranger does to a folder."""

import json

from safetensors.torch import load_file, save_file


def edit_config(folder, change):
    """Apply a function to the ``quantization_config`` of a folder's config.json, in place."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values["quantization_config"])
    path.write_text(json.dumps(values))


def edit_tensors(folder, change, file="model.safetensors"):
    """Apply a function to the tensors of a file in a folder, a dict, in place."""
    path = folder / file
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, {"format": "pt"})
