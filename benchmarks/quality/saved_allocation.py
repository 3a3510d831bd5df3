"""Bit allocations that are saved beside the float32 model they were made for.

Arms of a comparison share one, with and without noise, and it takes minutes to find.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

from hf_quantnoise import IPQConfig
from hf_quantnoise.files.durable import write_json


def saved_allocation(folder: str, made_for: list[Any], allocate: Callable[[], IPQConfig]):
    """Return the config with allocated bits that a folder has, or a new one.

    Args:
        folder: folder of the float32 model.
        made_for: what the allocation depends on, for JSON.
        allocate: makes a new one.
    """
    digest = hashlib.sha256(json.dumps(made_for).encode()).hexdigest()[:16]
    path = os.path.join(folder, f"allocation-{digest}.json")
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            return IPQConfig.from_dict(json.load(file))
    config = allocate()
    write_json(config.to_dict(), path)
    return config
