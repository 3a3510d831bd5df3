#!/usr/bin/env python
"""Compare a compressed text classifier with the dense one: answers, size and latency, in a browser.

    python examples/space/app.py --dense out/dense --compressed out/compressed out/smaller

``--dense`` and ``--compressed`` are folders or repositories of the Hub. A Space has no command
line: there the variables DENSE_MODEL and COMPRESSED_MODELS (separated by commas) are read.
"""

from __future__ import annotations

import argparse
import html
import os
import statistics
import sys
import time
from dataclasses import dataclass
from functools import cache

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
from transformers import AutoModelForSequenceClassification, pipeline

from hf_quantnoise import size_report
from hf_quantnoise.hub.model_classes import load_complete
from hf_quantnoise.runs.loading import errors_name_model
from hf_quantnoise.runs.tokenizers import load_tokenizer, position_limit

HEADERS = ["model", "answer", "score", "MB on disk", "times smaller", "ms per text"]
REPEATS = 5
MAX_CHARACTERS = 20_000  # far beyond the tokens of a classifier; all users wait for each text


@dataclass(frozen=True)
class Loaded:
    """A model that classifies, and its size in bytes on disk."""

    classify: object
    disk_bytes: int

    def answer(self, text: str) -> tuple[str, float, float]:
        """Return label and score, and the median time in milliseconds, with tokenization."""
        (best,) = self.classify(text, truncation=True)
        times = []
        for _ in range(REPEATS):  # the call above was the warm-up
            start = time.perf_counter()
            self.classify(text, truncation=True)
            times.append(1000 * (time.perf_counter() - start))
        return best["label"], best["score"], statistics.median(times)


@cache
def load(flag: str, name: str) -> Loaded:
    """Load a model of a folder or of the Hub, when it is used for the first time.

    Raises:
        ValueError: with the flag, if it is missing or cannot classify texts.
    """
    with errors_name_model(f"invalid --{flag}", name):
        # A pipeline would load another task's model with a random head.
        model = load_complete(AutoModelForSequenceClassification, name, trust_remote_code=False)
    if model.config.num_labels < 2:
        raise ValueError(f"invalid --{flag} {name!r}: it has one output, expected a classifier")
    tokenizer = load_tokenizer(flag, name)
    if (limit := position_limit(model)) is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    return Loaded(classify, size_report(model).total.disk_bytes)


def compare(text: str | None, compressed: str | None, dense: str) -> tuple[list[list], str]:
    """Return the rows of the table, for the dense model and a compressed one, and a summary."""
    if not text or not text.strip():
        raise gr.Error("Enter a text.", print_exception=False)
    if len(text) > MAX_CHARACTERS:
        message = f"Enter a text of at most {MAX_CHARACTERS:,} characters; it has {len(text):,}."
        raise gr.Error(message, print_exception=False)
    if not isinstance(compressed, str):
        raise gr.Error("Choose a compressed model.", print_exception=False)
    try:
        models = {dense: load("dense", dense), compressed: load("compressed", compressed)}
    except ValueError as error:
        raise gr.Error(html.escape(str(error), quote=False)) from error
    rows, times = [], []
    for name in (dense, compressed):
        label, score, milliseconds = models[name].answer(text)
        times.append(milliseconds)
        smaller = models[dense].disk_bytes / models[name].disk_bytes
        size = f"{models[name].disk_bytes / 1e6:.2f}"
        rows.append([name, label, f"{score:.3f}", size, f"{smaller:.1f}", f"{milliseconds:.1f}"])
    same = "The same answer" if rows[0][1] == rows[1][1] else "Another answer"
    return rows, f"{same}, {smaller:.1f} times smaller, {times[1] / times[0]:.2f} times the time."


def build(dense: str, compressed: list[str]) -> gr.Blocks:
    """Return the page."""
    with gr.Blocks(title="Compressed and dense", analytics_enabled=False) as page:
        gr.Markdown(
            "# A compressed model beside the dense one\n"
            "Both classify the same text on this machine's CPU. The compressed models were made "
            "with quantization noise and product quantization "
            "([hf_quantnoise](https://github.com/hf-quantnoise/hf_quantnoise))."
        )
        text = gr.Textbox(
            "A warm, witty film with a moving end.", label="Text", max_length=MAX_CHARACTERS
        )
        name = gr.Dropdown(compressed, value=compressed[0], label="Compressed model")
        button = gr.Button("Compare", variant="primary")
        table = gr.Dataframe(headers=HEADERS, interactive=False, label="Results")
        summary = gr.Markdown()
        # One at a time, so that one measurement does not slow down another.
        gr.on(
            [button.click, text.submit],
            lambda text, name: compare(text, name, dense),
            [text, name],
            [table, summary],
            concurrency_limit=1,
            api_name="compare",
        )
    return page


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, with the variables of a Space as defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words = os.environ.get("COMPRESSED_MODELS", "").split(",")
    names = [word.strip() for word in words if word.strip()]
    parser.add_argument("--dense", default=os.environ.get("DENSE_MODEL", "").strip())
    parser.add_argument("--compressed", nargs="+", default=names)
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    options = parser.parse_args(argv)
    if not options.dense or not options.compressed:
        parser.error(
            "no models: pass --dense and --compressed, or set DENSE_MODEL and COMPRESSED_MODELS"
        )
    return options


def main(argv: list[str] | None = None) -> None:
    """Start the server, on the loopback unless GRADIO_SERVER_NAME is set, as in a Space."""
    options = parse_arguments(argv)
    try:  # so that a missing model is an error at the start
        load("dense", options.dense)
        load("compressed", options.compressed[0])
    except ValueError as error:
        sys.exit(f"error: {error}")
    build(options.dense, options.compressed).launch(server_port=options.port)


if __name__ == "__main__":
    main()
