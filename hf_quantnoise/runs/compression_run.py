"""The run of all examples: finetune, evaluate, compress, save, reload, print a table.

``out/dense`` is the finetuned model, ``out/compressed`` the compressed one, ``out/results.json``
has all results. With ``--do_train False`` the checkpoint is compressed as it is.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import datasets
import torch
import transformers
from transformers import AutoConfig, PreTrainedModel, Trainer, set_seed

import hf_quantnoise

from ..compression import check_compression, check_plan
from ..repository import create_repository, upload_folder
from ..size import size_report
from ..trainer import QuantNoiseTrainer
from .arguments import Arguments, parse_arguments
from .closing_table import Row, closing_table, weights_mb

DENSE, COMPRESSED = "dense", "compressed"


@dataclass
class Job:
    """Model, data and metadata that an example prepares.

    Attributes:
        model: the checkpoint, with the head for the data.
        parts: keyword arguments of any ``Trainer``: datasets, collator, metrics, processing class.
        auto_class: the class that loads the compressed model.
        metric: the metric of the closing table.
        task: name of the task on the Hub, for the model card.
        dataset: name of the data on the Hub, for the model card; or None.
        add_scores: computes more metrics from those of ``evaluate`` (perplexity from loss).
    """

    model: PreTrainedModel
    parts: dict
    auto_class: type
    metric: str
    task: str
    dataset: str | None = None
    add_scores: Callable[[dict[str, float]], dict[str, float]] = field(default=dict)


class ResultsFile:
    """``results.json``, written again with each result, so that an interrupted run has some."""

    def __init__(self, path: str, enabled: bool = True) -> None:
        self.path, self.enabled, self.values = path, enabled, {}

    def add(self, **values) -> None:
        """Add results and write the file."""
        self.values.update(values)
        if not self.enabled:
            return
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        with open(f"{self.path}.part", "w", encoding="utf-8") as file:
            json.dump(self.values, file, indent=2, default=str)
            file.write("\n")
        os.replace(f"{self.path}.part", self.path)


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    return {
        "hf_quantnoise": hf_quantnoise.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
        "python": platform.python_version(),
    }


def finetunes_stages(args: Arguments) -> bool:
    """Whether the stages train, so that training data is needed even without ``--do_train``."""
    return args.flags.compress and args.compression.trains(args.quantization.stage_groups())


def require_train_data(args: Arguments, given: bool) -> None:
    """Raise a ``ValueError`` if the stages need training data and there is none."""
    if finetunes_stages(args) and not args.training.do_train and not given:
        raise ValueError(
            f"--stage_epochs {args.compression.stage_epochs} finetunes in the stages, which "
            "requires --train_file; pass it, or --stage_epochs 0 to quantize without finetuning"
        )


def scores(metrics: dict[str, float], job: Job) -> dict[str, float]:
    """Return the metrics of ``evaluate`` without prefix, and those that the example adds."""
    plain = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    return {**plain, **job.add_scores(plain)}


@torch.no_grad()
def logits_equal(one, other, collator, rows, device) -> bool:
    """Whether two models give bit-equal logits on some tokenized rows."""
    rows = collator([dict(row) for row in rows])
    batch = {name: tensor.to(device) for name, tensor in rows.items() if name != "labels"}
    first, second = (model.to(device).eval()(**batch).logits for model in (one, other))
    return torch.equal(first, second)


def set_up_logging(training) -> None:
    """Log to stdout, at the level of ``--log_level``."""
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
    )
    level = training.get_process_log_level()
    logging.getLogger(__package__).setLevel(level)
    datasets.utils.logging.set_verbosity(max(level, logging.WARNING))
    transformers.utils.logging.set_verbosity(level)


def _finetune(trainer: QuantNoiseTrainer, args: Arguments, job: Job, folder: str) -> dict:
    """Train, evaluate and save the dense model; return its results."""
    figures: dict = {"dtype": str(trainer.model.dtype).removeprefix("torch.")}
    start = time.perf_counter()
    if args.training.do_train:
        output = trainer.train(resume_from_checkpoint=args.training.resume_from_checkpoint)
        figures["training"] = output.metrics
    figures["seconds"] = time.perf_counter() - start
    if args.training.do_eval:
        figures["metrics"] = scores(trainer.evaluate(), job)
    trainer.save_model(folder)
    args.training.distributed_state.wait_for_everyone()  # rank 0 writes what all ranks read
    figures["bytes"] = round(1e6 * weights_mb(folder))
    return figures


def _earlier_figures(output_dir: str) -> dict:
    """Return the results of the dense model of an interrupted run.

    Raises:
        ValueError: if there are none.
    """
    path = os.path.join(output_dir, "results.json")
    if not os.path.isfile(path):
        raise ValueError(
            f"--resume_compression: {path} is missing, so there is no run to resume; pass the "
            "--output_dir of the interrupted run, or remove the flag"
        )
    with open(path, encoding="utf-8") as file:
        values = json.load(file)
    if "dense" not in values:
        raise ValueError(
            f"--resume_compression: the run in {output_dir!r} was interrupted before compression; "
            "pass --resume_from_checkpoint to resume its finetuning"
        )
    return values["dense"]


def _check_checkpoints(args: Arguments) -> None:
    """Raise a ``ValueError`` that names the flag if model or teacher cannot be loaded."""
    where, model = args.model.hub(), args.model.model_name_or_path
    teacher = {name: value for name, value in where.items() if name != "revision"}
    for flag, name, more in (
        ("config_name", args.model.config_name, where),
        ("model_name_or_path", None if args.model.config_name else model, where),
        ("teacher_name_or_path", args.flags.teacher_name_or_path, teacher),
    ):
        try:
            if name is not None:
                AutoConfig.from_pretrained(name, **more)
        except (OSError, ValueError) as error:
            raise ValueError(f"invalid --{flag} {name!r}: cannot be loaded ({error})") from None


def _given_teacher(args: Arguments, job: Job) -> PreTrainedModel | None:
    name = args.flags.teacher_name_or_path
    if name is None:
        return None
    return job.auto_class.from_pretrained(
        name, dtype=args.model.dtype, cache_dir=args.model.cache_dir, token=args.model.token
    )


def _compress(
    trainer: QuantNoiseTrainer, args: Arguments, job: Job, small_config, results: ResultsFile
) -> dict:
    """Compress in stages and save; return the results of the compressed model."""
    folder = os.path.join(args.training.output_dir, COMPRESSED)
    start = time.perf_counter()
    small = trainer.compress(
        small_config,
        args.compression,
        teacher=_given_teacher(args, job),
        report=lambda _: results.add(stages_so_far=trainer.compression_history),
        resume_from_checkpoint=args.flags.resume_compression,
    )
    del results.values["stages_so_far"]  # now part of the results below
    figures = {"seconds": time.perf_counter() - start, "stages": trainer.compression_history}
    if args.training.should_save:
        small.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
    _write_card(trainer, args, job, folder)
    args.training.distributed_state.wait_for_everyone()
    report = size_report(small)
    if args.training.process_index == 0:
        print(f"\n{report}", flush=True)
    figures["bytes"] = round(1e6 * weights_mb(folder))
    figures["reported_bytes"] = report.total.disk_bytes
    return figures


def _reload(trainer: QuantNoiseTrainer, args: Arguments, job: Job, folder: str) -> dict:
    """Load the compressed model and evaluate it.

    Raises:
        RuntimeError: if its logits are not bit-equal to those of the model in memory.
    """
    fresh, parts = job.auto_class.from_pretrained(folder), job.parts
    examples = parts["eval_dataset"] or parts["train_dataset"]
    figures: dict = {}
    if examples is not None:
        rows = examples.select(range(min(32, len(examples))))
        device = args.training.device
        equal = logits_equal(trainer.model, fresh, parts["data_collator"], rows, device)
        figures["logits_bit_equal"] = equal
        if not equal:
            raise RuntimeError(
                f"the model loaded from {folder!r} has other logits than the model in memory"
            )
    if args.training.do_eval:
        figures["metrics"] = scores(Trainer(fresh, args.training, **parts).evaluate(), job)
    return figures


def _push(trainer: QuantNoiseTrainer, args: Arguments, job: Job, folder: str) -> None:
    """Upload the files that were checked, with a model card that names the repository."""
    training = args.training
    name = training.hub_model_id or os.path.basename(os.path.abspath(training.output_dir))
    token = training.hub_token
    trainer.hub_model_id = create_repository(name, private=training.hub_private_repo, token=token)
    _write_card(trainer, args, job, folder)
    upload_folder(folder, trainer.hub_model_id, token=token)


def _write_card(trainer: QuantNoiseTrainer, args: Arguments, job: Job, folder: str) -> None:
    trainer.create_model_card(tasks=job.task, dataset=job.dataset)
    if args.training.should_save:
        os.replace(
            os.path.join(args.training.output_dir, "README.md"), os.path.join(folder, "README.md")
        )


def _closing_table(results: ResultsFile, args: Arguments) -> str:
    """Return the table of dense and compressed model: MB on disk, ratio and metric."""
    values, metric = results.values, results.values["metric"]
    dense, small = values["dense"], values.get("compressed")
    kind = "finetuned" if "training" in dense else "given"
    score = dense.get("metrics", {}).get(metric)
    rows = [Row(f"{kind}, {dense['dtype']}", dense["bytes"] / 1e6, score)]
    if small is not None:
        score = values["reloaded"].get("metrics", {}).get(metric)
        rows.append(Row("compressed, reloaded", small["bytes"] / 1e6, score))
    return closing_table(rows, metric)


def _settings(args: Arguments, job: Job) -> dict:
    """Return everything that determines the results of a run."""
    counts = {"train": job.parts["train_dataset"], "validation": job.parts["eval_dataset"]}
    return {
        "seed": args.training.seed,
        "command": args.command,
        "versions": versions(),
        "arguments": args.to_dict(),
        "examples": {name: len(rows) if rows else 0 for name, rows in counts.items()},
        "metric": job.metric,
    }


def run(args: Arguments, prepare: Callable[[Arguments], Job]) -> dict:
    """Run an example.

    Args:
        args: the command line.
        prepare: loads data and model.

    Returns:
        The content of ``results.json``.
    """
    training = args.training
    _check_checkpoints(args)
    noise_config = args.noise
    small_config = args.quantization if args.flags.compress else None
    if not (training.do_train or args.compression.keep_noise):
        noise_config = None
    earlier = {}
    if args.flags.resume_compression:
        earlier = {"dense": _earlier_figures(training.output_dir)}
        training.do_train = False
        noise_config = noise_config if args.compression.keep_noise else None
    # Only the final model is pushed, not each checkpoint of the float one.
    push, training.push_to_hub = training.push_to_hub, False
    folders = [os.path.join(training.output_dir, name) for name in (DENSE, COMPRESSED)]
    results = ResultsFile(os.path.join(training.output_dir, "results.json"), training.should_save)

    set_seed(training.seed)
    job = prepare(args)
    if args.flags.resume_compression:
        # Finetuned: compression may have been interrupted before it saved the model itself.
        job.model = job.auto_class.from_pretrained(folders[0], dtype=args.model.dtype)
    if small_config is not None:
        check_plan(job.model, small_config)  # before training
    results.add(**_settings(args, job), **earlier)
    results.add(
        noise=noise_config.to_dict() if noise_config else None,
        quantization=small_config.to_dict() if small_config else None,
    )
    if not training.do_eval:
        job.parts["eval_dataset"] = None
    trainer = QuantNoiseTrainer(job.model, training, noise_config, **job.parts)
    if small_config is not None:
        check_compression(trainer, small_config, args.compression)
    if not args.flags.resume_compression:
        results.add(dense=_finetune(trainer, args, job, folders[0]))
    if small_config is not None:
        results.add(compressed=_compress(trainer, args, job, small_config, results))
        results.add(reloaded=_reload(trainer, args, job, folders[1]))
    if push and training.should_save:
        _push(trainer, args, job, folders[small_config is not None])
    if training.process_index == 0:
        print(f"\n{_closing_table(results, args)}", flush=True)
    return results.values


@dataclass(frozen=True)
class Example:
    """An example script: its data flags, its description and how it prepares a job."""

    data_class: type
    description: str
    prepare: Callable[[Arguments], Job]

    def parse(self, argv: list[str] | None = None, prog: str | None = None) -> Arguments:
        """Parse a command line; ``argv`` and ``prog`` default to those of the process."""
        return parse_arguments(self.data_class, self.description, argv, prog)

    def run(self, args: Arguments) -> dict:
        """Run a command line; return the content of ``results.json``."""
        return run(args, self.prepare)

    def start(self, args: Arguments) -> dict:
        """Run a command line with logs on the console."""
        set_up_logging(args.training)
        return self.run(args)

    def main(self, argv: list[str] | None = None) -> dict:
        """Parse and run a command line."""
        return self.start(self.parse(argv))
