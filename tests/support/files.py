"""Contents of the folder of a saved model."""

import hashlib
from pathlib import Path


def digest(folder: Path) -> dict[str, str]:
    """Return {name of a model file: hash of its content}."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.suffix in (".safetensors", ".json")
    }
