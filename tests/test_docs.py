"""The reference lists every field with its default."""

import dataclasses
import re
from pathlib import Path

import pytest

from hf_quantnoise import CompressionArguments, FixedPointConfig, IPQConfig, QuantNoiseConfig

PAGE = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text()


@pytest.mark.parametrize(
    "config", [QuantNoiseConfig, IPQConfig, FixedPointConfig, CompressionArguments]
)
def test_the_reference_is_the_code(config):
    section = PAGE.split(f"## {config.__name__}\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", section, re.MULTILINE))
    made = config()
    fields = {field.name: getattr(made, field.name) for field in dataclasses.fields(config)}
    assert rows == {name: repr(value).replace("'", '"') for name, value in fields.items()}
