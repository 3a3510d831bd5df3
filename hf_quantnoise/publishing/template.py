"""The Jinja template of a model card: the package's, or one of the user."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from huggingface_hub import ModelCardData

from ..argument_checks import require_path

# Variables of a template besides ``card_data`` (the metadata as YAML) and its single fields. They
# are Markdown, empty if the card lacks that part; ``packed`` is a bool, ``plot`` a path or None.
VARIABLES = (
    "title", "introduction", "packed", "snippet", "dataset", "results", "sizes", "plot", "storage",
    "stages", "noise", "training", "compression", "versions",
)  # fmt: skip


def read_template(path: str | os.PathLike | None = None) -> str:
    """Return the text of a card template; None is the one of this package.

    Raises:
        ValueError: if the file is missing, is not a template, lacks the metadata or uses an unknown
            variable.
        TypeError: if the path has another type.
    """
    if path is None:
        return (files(__package__) / "template.md").read_text(encoding="utf-8")
    import jinja2
    from jinja2 import meta

    path = require_path("template", path)
    if not os.path.isfile(path):
        raise ValueError(f"invalid card template {path!r}: no such file; pass a Jinja template")
    try:
        text = Path(path).read_text(encoding="utf-8")
        used = meta.find_undeclared_variables(jinja2.Environment().parse(text))
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid card template {path!r}: not UTF-8 ({error})") from error
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"invalid card template {path!r}, line {error.lineno}: {error.message}; correct it"
        ) from error
    if "card_data" not in used:
        raise ValueError(
            f"invalid card template {path!r}: it has no metadata; begin it with the lines '---', "
            "'{{ card_data }}' and '---'"
        )
    if unknown := sorted(used - {"card_data", *VARIABLES, *vars(ModelCardData())}):
        raise ValueError(
            f"invalid card template {path!r}: unknown variable {unknown[0]!r}, expected card_data, "
            f"a field of the metadata, or one of {', '.join(VARIABLES)}"
        )
    return text
