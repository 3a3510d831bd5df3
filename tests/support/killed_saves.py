"""A program that kills saves at each step and prints what a reader finds after each.

Arguments: a folder, and names of scenarios. It is a program because it forks, which is unsafe where
threads run.
"""

import contextlib
import io
import json
import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar

from hf_quantnoise import AutoQuantizedModel, FixedPointConfig, QuantNoiseTrainer, quantize_model
from hf_quantnoise.cli import main as command_line
from hf_quantnoise.files.model_folders import COMPLETE
from support.kills import each_kill
from support.tiny import make_model
from support.words import words

SHARDS = {"max_shard_size": "8KB"}
SHAPES = {"single": {}, "shards": SHARDS}
IDS = torch.arange(5, 35).reshape(2, -1)
OF_TRANSFORMERS = "transformers' own method"


def tokenizer(number):
    made = words()
    made.model_max_length = 16 + number  # differs between models
    return made


def packed(number):
    model = quantize_model(make_model("bert", number), FixedPointConfig(), progress=False)
    model.quantnoise_processing = tokenizer(number)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def trainer_of(model, number, folder):
    arguments = TrainingArguments(str(folder), report_to=[], use_cpu=True)
    return QuantNoiseTrainer(model, arguments, processing_class=tokenizer(number))


def overwrite(*line):
    with contextlib.redirect_stdout(io.StringIO()):
        assert command_line([*map(str, line), "--overwrite"]) == 0


def prepare(scenario, work):
    """Save the old model; return the loader, both models and the function that saves the new."""
    old, folder, given = work / "old", work / "folder", work / "given"
    models = [packed(0), packed(1)]
    if scenario == "trainer, dense":
        models = [make_model("bert", 0), make_model("bert", 1)]
        trainers = [trainer_of(model, i, work / "run") for i, model in enumerate(models)]
        trainers[0].save_model(str(old))
        return AutoModelForSequenceClassification, models, partial(trainers[1].save_model, folder)
    if scenario == "trainer, packed":
        models[0].save_pretrained(old, **SHARDS)
        trainer = trainer_of(models[1], 1, work / "run")
        return AutoQuantizedModel, models, partial(trainer.save_model, folder)
    if scenario == OF_TRANSFORMERS:
        models[0].save_pretrained(old, **SHARDS)
        save = partial(PreTrainedModel.save_pretrained, models[1], folder, **SHARDS)
        return AutoQuantizedModel, models, save
    if scenario in ("compress", "convert"):
        make_model("bert", 1).save_pretrained(given)
        tokenizer(1).save_pretrained(given)
        line = ["compress", given, folder, "--scheme", "fixed_point"]
        loader = AutoQuantizedModel
        if scenario == "convert":
            models[1].save_pretrained(given)
            line = ["convert", given, folder, "--to", "dense"]
            models = [model.dequantize() for model in models]
            loader = AutoModelForSequenceClassification
            tokenizer(0).save_pretrained(old)
        models[0].save_pretrained(old)
        (old / "training_args.bin").write_text("of the old model")
        return loader, models, partial(overwrite, *line)
    new, before = scenario.split(" over ")
    models[0].save_pretrained(old, **SHAPES[before])
    return AutoQuantizedModel, models, partial(models[1].save_pretrained, folder, **SHAPES[new])


def run(scenario, work):
    """Return how often each result was found, the errors, and the kills that lost a model."""
    loader, models, save = prepare(scenario, work)
    old, folder, expected = work / "old", work / "folder", [logits(model) for model in models]

    def found_in(folder):
        try:
            made = logits(loader.from_pretrained(folder))
        except (OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        (number,) = [number for number in (0, 1) if torch.equal(made, expected[number])]
        if scenario != OF_TRANSFORMERS:
            assert AutoTokenizer.from_pretrained(folder).model_max_length == 16 + number
        return ("old", "new")[number]

    counts, errors, lost = Counter(), set(), []
    for kill in each_kill(old, folder, save):
        found = found_in(folder)
        is_error = found not in ("old", "new")
        counts["error" if is_error else found] += 1
        if is_error:
            errors.add(found.replace(str(folder), "FOLDER"))
            if not ((folder / COMPLETE).is_dir() and found_in(folder / COMPLETE) == "new"):
                lost.append(kill)
        if kill != "complete" and counts.total() % 4 == 0:
            save()  # which repairs everything
        elif kill != "complete":
            continue
        assert found_in(folder) == "new", kill
        names = sorted(path.name for path in folder.iterdir())
        assert COMPLETE not in names and not any(n.startswith(".") for n in names), (kill, names)
        assert not any(name.endswith(".new") for name in names), (kill, names)
        if scenario in ("compress", "convert"):
            assert "training_args.bin" not in names, (kill, names)
    return {"counts": counts, "errors": sorted(errors), "lost": lost}


if __name__ == "__main__":
    torch.set_num_threads(1)
    disable_progress_bar()
    results = {}
    for index, name in enumerate(sys.argv[2:]):
        place = Path(sys.argv[1]) / str(index)
        results[name] = run(name, place)
        shutil.rmtree(place)
    print("RESULTS", json.dumps(results))
