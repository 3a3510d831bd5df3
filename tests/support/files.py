"""What is in a folder that a model was saved to."""

import hashlib
from pathlib import Path


def digest(folder: Path) -> dict[str, str]:
    """Name of each file of a model -> the hash of its bytes."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.suffix in (".safetensors", ".json")
    }
