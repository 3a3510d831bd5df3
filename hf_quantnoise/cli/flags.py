"""Flags of commands as ``flags.json`` holds them: errors and help import no torch.

``docs/write_flags.py`` writes the file from the dataclasses of the flags, and a test
compares them. The flags of ``TrainingArguments`` depend on the version of transformers; their names
are read from its source.
"""

from __future__ import annotations

import ast
import json
from argparse import ArgumentParser
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..argument_parsing import TRACEBACK, UsageError, unknown_flags

PATH = Path(__file__).with_suffix(".json")
_BOOLEANS = {
    **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
    **dict.fromkeys(("no", "false", "f", "n", "0"), False),
}


def boolean(text: str) -> bool:
    """Return a boolean written as in ``HfArgumentParser``."""
    try:
        return _BOOLEANS[text.lower()]
    except KeyError:
        raise ValueError(text) from None


TYPES = {"int": int, "float": float, "str": str, "bool": boolean}


@cache
def stored() -> dict[str, Any]:
    """Return the content of the file."""
    content: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
    return content


def add_stored(parser: ArgumentParser, flags: Iterable[dict[str, Any]]) -> None:
    """Add stored flags, which are the arguments of ``add_argument``, to a parser."""
    for flag in flags:
        arguments = dict(flag)
        names = arguments.pop("names")
        if "choices" in flag:
            by_text = {str(choice): choice for choice in flag["choices"]}
            arguments["type"] = lambda text, by_text=by_text: by_text.get(text, text)
        elif "type" in flag:
            arguments["type"] = TYPES[flag["type"]]
        parser.add_argument(*names, **arguments)


def training_flags() -> list[str]:
    """Return the names of the fields of transformers' ``TrainingArguments``, without importing it.

    An empty list if transformers is not installed, or no longer declares them in one class.
    """
    spec = find_spec("transformers")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "training_args.py"
        for node in ast.parse(path.read_text("utf-8")).body if path.is_file() else ():
            if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments":
                fields = (each.target for each in node.body if isinstance(each, ast.AnnAssign))
                return [field.id for field in fields if isinstance(field, ast.Name)]
    return []


def check_names(task: str, words: Iterable[str]) -> None:
    """Raise a :class:`UsageError` for words that are not flags of ``finetune``.

    Values are not checked.
    """
    if not (training := training_flags()):
        return  # the parser of the task reports them
    names = stored()["finetune"][task]
    known = [f"--{name}" for name in (*names["flags"], *training)]
    accepted = [*known, *(f"--{name}" for name in names["explained"]), "--help", TRACEBACK]
    accepted += [f"--no_{flag[2:]}" for flag in known]  # of booleans that are True by default
    unknown, in_unknown = [], False
    for word in words:
        if word == "--":
            break
        if word.startswith("-"):
            flag = "--" + word.partition("=")[0][2:].replace("-", "_")
            # An abbreviation is a flag, too.
            in_unknown = word[1:2] == "-" and not any(name.startswith(flag) for name in accepted)
        if in_unknown:  # a flag, or its values
            unknown.append(word)
    if unknown:
        raise UsageError(unknown_flags(unknown, known))
