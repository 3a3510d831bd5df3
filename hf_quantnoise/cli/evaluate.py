"""``hf-quantnoise eval``."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..argument_parsing import TRACEBACK, OneLineErrors, add_traceback_argument, unknown_flags
from .command import COMMANDS, Command
from .flags import add_stored, stored
from .tasks import add_task_arguments, add_task_parsers, task_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@COMMANDS.register("eval")
class Evaluate(Command):
    """Compare compressed models with the dense one on a dataset.

    Prints size, metrics, agreement (equal predictions), divergence (mean KL of the outputs, in
    nats), the time of a forward pass and the speed relative to the dense model. The models are
    timed in turns. TASK --help lists the flags of the data, which are those of finetune for
    validation data. Requires pip install 'hf-quantnoise[examples]'.
    """

    examples = (
        "hf-quantnoise eval glue out/dense out/compressed --validation_file dev.csv",
        "hf-quantnoise eval glue out/dense out/compressed --validation_file dev.csv --json",
    )

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add_task_arguments(parser, "evaluate")

    @classmethod
    def add_completion(cls, parser: ArgumentParser) -> None:
        def make(example: Any) -> ArgumentParser:
            from ..runs.evaluation import evaluation_parser

            return evaluation_parser(example, add_help=False)

        add_task_parsers(parser, make)

    @staticmethod
    def run(args: Namespace) -> None:
        args.parser.prog += f" {args.task}"  # whose --help lists the flags
        args.traceback |= TRACEBACK in args.flags
        check_words(args.task, args.flags, args.parser.prog)
        example = task_module(args.task, "eval").example
        from ..runs.evaluation import evaluation_parser, parse, prepared_evaluation, provenance

        data, flags, names = parse(evaluation_parser(example, args.parser.prog), args.flags)
        progress = sys.stderr.isatty()
        rows: list[dict[str, Any]] = []
        models: list[PreTrainedModel] = []
        with prepared_evaluation(example, data, flags, names.dense, progress) as evaluation:
            for name in (names.dense, *names.models):
                model = evaluation.job.model if not rows else evaluation.load(name)
                found = evaluation.results(model)
                rows.append({"model": name, "bytes": _file_bytes(name, model), **found})
                models.append(model)
            timed, latencies = evaluation.timings(models)
            rows = [{**row, **times} for row, times in zip(rows, latencies, strict=True)]
            about = {"examples": evaluation.examples, **provenance(evaluation.training)}
        if flags.json:
            print(json.dumps({"task": args.task, **about, **timed, "models": rows}, indent=2))
        else:
            print(_table(rows))
            shapes = (" x ".join(map(str, shape)) for shape in timed["timed_shapes"].values())
            about[f"timed {timed['timed_input']}"] = " and ".join(shapes)
            print("\n" + ", ".join(f"{name}: {value}" for name, value in about.items()))


def check_words(task: str, words: list[str], prog: str) -> None:
    """Exit if the words are invalid, or ask for help; no parser with their dataclasses is needed.

    Args:
        task: the task.
        words: the command line after the task.
        prog: the command line before the words.
    """
    from .parser import ExamplesFormatter, examples_text

    parser = OneLineErrors(
        prog=prog,
        description="Compare models on the same data, each with the first one.",
        epilog=examples_text(Evaluate),
        formatter_class=ExamplesFormatter,
    )
    add_stored(parser, stored()["eval"][task])
    add_traceback_argument(parser)
    _, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(unknown_flags(unknown, parser._option_string_actions))


def _file_bytes(name: str, model: PreTrainedModel) -> int:
    """Return the bytes of the weights on disk."""
    from ..size import size_report
    from .checkpoints import Checkpoint

    headers = Checkpoint(name).headers
    return size_report(model).total.disk_bytes if headers is None else headers.file_bytes


def _table(rows: Sequence[dict[str, Any]]) -> str:
    from ..size import aligned

    nearness = ("agreement", "divergence", "difference")
    columns = [name for name in nearness if any(name in row for row in rows)]
    metrics, sizes = rows[0]["metrics"], rows[0]["milliseconds"]
    lines = [
        ("model", "MB", "times smaller", *metrics, *columns,
         *(f"ms (batch of {size})" for size in sizes))
    ]  # fmt: skip
    for row in rows:
        values = [row["metrics"][name] for name in metrics] + [row.get(name) for name in columns]
        lines.append(
            (
                row["model"],
                f"{row['bytes'] / 1e6:.3f}",
                f"{rows[0]['bytes'] / row['bytes']:.1f}",
                *("" if value is None else f"{value:.4f}" for value in values),
                *(f"{row['milliseconds'][size]:.2f} ({row['speed'][size]:.2f}x)" for size in sizes),
            )
        )
    return aligned(lines, left=1)
