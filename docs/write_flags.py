"""Write hf_quantnoise/cli/flags.json: the flags of commands, from the dataclasses that define them.

    python docs/write_flags.py

A test compares the file with the code.
"""

from __future__ import annotations

import json
from argparse import SUPPRESS, ArgumentParser
from dataclasses import fields
from typing import Any

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from hf_quantnoise.argument_parsing import TRACEBACK
from hf_quantnoise.cli.flags import PATH
from hf_quantnoise.cli.tasks import TASKS, task_module
from hf_quantnoise.configuration import IPQConfig
from hf_quantnoise.configuration.flags import QuantizationFlags
from hf_quantnoise.configuration.options import options_of
from hf_quantnoise.runs.arguments import RunTrainingArguments
from hf_quantnoise.runs.evaluation import evaluation_parser

_TYPES = {int: "int", float: "float", str: "str", None: "str", string_to_bool: "bool"}


def described(parser: ArgumentParser) -> list[dict[str, Any]]:
    """Return the arguments of a parser but ``--traceback``, as arguments of ``add_argument``."""
    found = []
    for action in parser._actions:
        if TRACEBACK in action.option_strings:
            continue
        values: dict[str, Any] = {
            "names": action.option_strings or [action.dest],
            "help": action.help,
            "metavar": action.metavar,
            "default": action.default,
        }
        if action.nargs == 0:  # a switch
            values |= {"action": "store_const", "const": action.const, "dest": action.dest}
        else:
            values |= {"nargs": action.nargs, "const": action.const}
            if action.choices is not None:
                values["choices"] = list(action.choices)
            else:
                values["type"] = _TYPES[action.type]
            if action.option_strings and action.required:
                values["required"] = True
        found.append({name: value for name, value in values.items() if value is not None})
    return found


def quantization_flags() -> list[dict[str, Any]]:
    """Return the flags of the compressed model, which ``plan`` and ``compress`` have."""
    parser = HfArgumentParser([QuantizationFlags], add_help=False)
    parser.add_argument("--seed", type=int, default=0, help=options_of(IPQConfig)["seed"].help)
    return described(parser)


def finetuning_flags(task: str) -> dict[str, list[str]]:
    """Return the names of flags, without those of training, and of flags that errors explain."""
    parser = task_module(task, "finetune").example.parser()
    classes = [each for each in parser.dataclass_types if each is not RunTrainingArguments]
    removed = [a.option_strings[0] for a in parser._actions if a.help == SUPPRESS]
    explained = {*parser.elsewhere, *(flag.removeprefix("--") for flag in removed)}
    return {
        "flags": [field.name for each in classes for field in fields(each)],
        "explained": sorted(explained - {TRACEBACK.removeprefix("--")}),
    }


def content() -> dict[str, Any]:
    """Return the content of the file."""

    def evaluation(task: str) -> list[dict[str, Any]]:
        return described(evaluation_parser(task_module(task, "eval").example, add_help=False))

    return {
        "compress": quantization_flags(),
        "eval": {task: evaluation(task) for task in TASKS},
        "finetune": {task: finetuning_flags(task) for task in TASKS},
    }


if __name__ == "__main__":
    text = json.dumps(content(), indent=1) + "\n"
    PATH.write_text(text, encoding="utf-8")
