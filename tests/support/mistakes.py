"""Mistakes in calls of the public API, and the structure that their error messages must have.

Every message must name the field, show the value, offer a way out, be one short sentence, and use
the project's vocabulary. The wording itself is not tested.
"""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import TrainingArguments

from hf_quantnoise import CompressionArguments, IPQConfig, QuantNoiseTrainer, quantize_model
from support.tiny import make_model

MAX_LENGTH = 300
# The allowed values, a suggestion, or an instruction after the semicolon.
WAY_OUT = re.compile(
    r"\b(must be|expected|one of|known|did you mean|(stages|groups) are)\b|"
    r"; (add|call|check|choose|compress|download|export|give|install|load|make|merge|name|pass|"
    r"quantize|read|remove|run|save|see|set|train|update|use|write)\b"
)
SECOND_SENTENCE = re.compile(r"(?<!e\.g)(?<!i\.e)[.!?]\s+\S|\n.")


def _load_banned_phrases() -> dict[re.Pattern, str]:
    path = Path(__file__).parents[2] / ".ci" / "check_language.py"
    spec = importlib.util.spec_from_file_location("check_language", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PATTERNS


BANNED = _load_banned_phrases()
SMALL = IPQConfig(block_size=4, n_centroids=16)


class Mistake(NamedTuple):
    """A call that raises, and the field and value that the message must mention.

    Attributes:
        call: takes a temporary folder.
        field: name of the argument, attribute or object at fault.
        value: the value as it is shown, or what identifies it; "" if there is none to show.
    """

    call: Callable[[Path], Any]
    field: str
    value: str = ""


def error_of(mistake: Mistake, folder: Path) -> tuple[type[Exception], str]:
    with pytest.raises(Exception) as caught:
        mistake.call(folder)
    return caught.type, str(caught.value).replace(str(folder), "out")


def mentions(message: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", message) is not None


def faults_of(message: str, mistake: Mistake) -> list[str]:
    """Return how a message departs from the structure of error messages."""
    faults = {
        f"does not name {mistake.field!r}": not mentions(message, mistake.field),
        f"does not show {mistake.value!r}": not mentions(message, mistake.value),
        "offers no way out": not WAY_OUT.search(message),
        f"is longer than {MAX_LENGTH} characters": len(message) > MAX_LENGTH,
        "has more than one sentence": SECOND_SENTENCE.search(message),
    }
    for pattern, instead in BANNED.items():
        if match := pattern.search(message):
            faults[f"uses {match[0]!r}; write {instead}"] = True
    return [fault for fault, is_present in faults.items() if is_present]


def check_message(mistake: Mistake, folder: Path) -> None:
    """Fail if the error of a mistake has another type or structure than it should."""
    error, message = error_of(mistake, folder)
    faults = faults_of(message, mistake)
    if not issubclass(error, (ValueError, TypeError, OSError)):
        faults.append(f"is a {error.__name__}")
    assert not faults, f"{message!r} {'; '.join(faults)}"


# ---- calls ---------------------------------------------------------------------------------------


def quantize(config, model=None, **kwargs):
    model = make_model("bert") if model is None else model
    return quantize_model(model, config, progress=False, **kwargs)


def trainer(folder, qn_config=None, model=None, **arguments):
    arguments = {"use_cpu": True, "report_to": "none", "save_strategy": "no", **arguments}
    rows = [{"input_ids": torch.arange(5), "labels": 0}] * 4
    return QuantNoiseTrainer(
        make_model("bert") if model is None else model,
        TrainingArguments(folder, **arguments),
        qn_config,
        train_dataset=rows,
    )


def compress(folder, config=SMALL, stage_epochs=1, teacher=None, resume=False, **arguments):
    arguments = CompressionArguments(stage_epochs=stage_epochs, plots=False, **arguments)
    return trainer(folder).compress(config, arguments, teacher, resume_from_checkpoint=resume)
