#!/usr/bin/env python
"""Finetunes a classifier with quantization noise, compresses it, saves it, loads it again.

One run: finetune with noise, evaluate, compress stage by stage, save, reload in a fresh model,
check that it answers bit for bit like the compressed one, evaluate again, print a closing table.

    python examples/run_glue.py --model_name_or_path roberta-base --task_name sst2 --output_dir out

    python examples/run_glue.py --model_name_or_path roberta-base \\
      --train_file train.csv --validation_file dev.csv --output_dir out \\
      --noise proxy --noise_rate 0.1 --block_size ffn=8,embeddings=8,attention=4

``out/dense`` is the finetuned model, ``out/compressed`` the small one, ``out/results.json`` holds
every figure. With ``--do_train False`` the checkpoint is compressed as it is. The flags are in
``glue_arguments.py`` and ``glue_data.py``; they can also be given as one JSON file.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time

import datasets
import torch
import transformers
from closing_table import Row, closing_table, weights_mb
from glue_arguments import Arguments, ModelArguments, parse_arguments
from glue_data import GlueData, load_glue_data, tokenize
from glue_labels import metrics_function
from huggingface_hub import HfApi
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

import hf_quantnoise
from hf_quantnoise import QuantNoiseTrainer, size_report

logger = logging.getLogger(__name__)


# ---- parts, which benchmarks use too -------------------------------------------------------------


class ResultsFile:
    """``results.json``: rewritten whole with every new figure, so that a broken run leaves some."""

    def __init__(self, path: str, enabled: bool = True) -> None:
        self.path, self.enabled, self.values = path, enabled, {}

    def add(self, **values) -> None:
        """Adds figures and writes the file."""
        self.values.update(values)
        if not self.enabled:
            return
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        with open(f"{self.path}.part", "w", encoding="utf-8") as file:
            json.dump(self.values, file, indent=2, default=str)
            file.write("\n")
        os.replace(f"{self.path}.part", self.path)


def versions() -> dict[str, str]:
    """Versions of what a figure depends on."""
    own = getattr(hf_quantnoise, "__version__", "unknown")
    return {
        "hf_quantnoise": own,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
        "python": platform.python_version(),
    }


def load_config_and_tokenizer(args: ModelArguments):
    """The checkpoint's config and tokenizer; a model without a padding token pads with its end."""
    config = AutoConfig.from_pretrained(args.config_name or args.model_name_or_path, **args.hub())
    tokenizer = AutoTokenizer.from_pretrained(
        args.tokenizer_name or args.model_name_or_path, **args.hub()
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        config.pad_token_id = tokenizer.pad_token_id
    return config, tokenizer


def load_model(args: ModelArguments, config: PretrainedConfig, data: GlueData) -> PreTrainedModel:
    """The checkpoint with a head for the data's labels, whose names go into its config."""
    if data.is_regression:
        config.num_labels = 1
        config.problem_type = "regression"
    else:
        config.id2label = dict(enumerate(data.label_names))
        config.label2id = {name: i for i, name in enumerate(data.label_names)}
    return AutoModelForSequenceClassification.from_pretrained(
        args.model_name_or_path,
        config=config,
        dtype=args.dtype,
        ignore_mismatched_sizes=args.ignore_mismatched_sizes,
        **args.hub(),
    )


def trainer_parts(data: GlueData, tokenizer: PreTrainedTokenizerBase) -> dict:
    """Keyword arguments of any ``Trainer`` for tokenized data."""
    return {
        "train_dataset": data.train,
        "eval_dataset": data.validation,
        "compute_metrics": metrics_function(data.metrics, data.is_regression),
        "processing_class": tokenizer,
        "data_collator": DataCollatorWithPadding(tokenizer),
    }


def scores(metrics: dict[str, float]) -> dict[str, float]:
    """``evaluate``'s figures without their prefix."""
    return {name.removeprefix("eval_"): value for name, value in metrics.items()}


@torch.no_grad()
def answers_equally(one, other, collator, rows, device) -> bool:
    """Whether two models give bit-equal logits on some tokenized rows."""
    batch = collator([dict(row) for row in rows]).to(device)
    batch.pop("labels", None)
    first, second = (model.to(device).eval()(**batch).logits for model in (one, other))
    return torch.equal(first, second)


# ---- the run -------------------------------------------------------------------------------------


def _set_up_logging(training) -> None:
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
    )
    level = training.get_process_log_level()
    logger.setLevel(level)
    logging.getLogger("glue_data").setLevel(level)
    logging.getLogger("glue_labels").setLevel(level)
    datasets.utils.logging.set_verbosity(max(level, logging.WARNING))
    transformers.utils.logging.set_verbosity(level)


def load_all(args: Arguments):
    """Tokenized data, tokenizer and model."""
    finetunes = args.options.compress and args.compression.stage_epochs > 0
    reads_train = args.data.train_file or (args.data.task_name and not args.data.from_files)
    if finetunes and not args.training.do_train and not reads_train:
        raise ValueError(
            f"--stage_epochs {args.compression.stage_epochs} finetunes between the stages and "
            "needs --train_file; give it, or --stage_epochs 0 to quantize without finetuning"
        )
    config, tokenizer = load_config_and_tokenizer(args.model)
    data = load_glue_data(
        args.data,
        config,
        train=args.training.do_train or finetunes,
        validation=args.training.do_eval,
        ignore_mismatched_sizes=args.model.ignore_mismatched_sizes,
        cache_dir=args.model.cache_dir,
        token=args.model.token,
    )
    model = load_model(args.model, config, data)
    with args.training.main_process_first(desc="tokenizing"):
        limit = getattr(config, "max_position_embeddings", None)
        data = tokenize(data, tokenizer, args.data, limit)
    return data, tokenizer, model


def _finetune(trainer: QuantNoiseTrainer, args: Arguments, folder: str) -> dict:
    """Trains and evaluates; returns the figures of the dense model, saved in ``folder``."""
    figures: dict = {"dtype": str(trainer.model.dtype).removeprefix("torch.")}
    start = time.perf_counter()
    if args.training.do_train:
        output = trainer.train(resume_from_checkpoint=args.training.resume_from_checkpoint)
        figures["training"] = output.metrics
    figures["seconds"] = time.perf_counter() - start
    if args.training.do_eval:
        figures["metrics"] = scores(trainer.evaluate())
    trainer.save_model(folder)
    figures["bytes"] = round(1e6 * weights_mb(folder))
    return figures


def _compress(
    trainer: QuantNoiseTrainer, args: Arguments, small_config, folder: str, results: ResultsFile
) -> dict:
    """Compresses in stages and saves; returns the figures of the small model."""
    start = time.perf_counter()
    small = trainer.compress(
        small_config,
        args.compression,
        report=lambda _: results.add(stages_so_far=trainer.compression_history),
    )
    del results.values["stages_so_far"]  # the figures below hold them
    figures = {"seconds": time.perf_counter() - start, "stages": trainer.compression_history}
    if args.training.should_save:
        small.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
    _write_card(trainer, args, folder)
    args.training.distributed_state.wait_for_everyone()
    report = size_report(small)
    if args.training.process_index == 0:
        print(f"\n{report}", flush=True)
    figures["bytes"] = round(1e6 * weights_mb(folder))
    figures["reported_bytes"] = report.total.disk_bytes
    return figures


def _reload(trainer: QuantNoiseTrainer, args: Arguments, parts: dict, folder: str) -> dict:
    """Loads the small model afresh and evaluates it.

    Raises:
        RuntimeError: if it does not give the very logits of the one in memory.
    """
    fresh = AutoModelForSequenceClassification.from_pretrained(folder)
    examples = parts["eval_dataset"] or parts["train_dataset"]
    figures: dict = {}
    if examples is not None:
        rows = examples.select(range(min(32, len(examples))))
        device = args.training.device
        equal = answers_equally(trainer.model, fresh, parts["data_collator"], rows, device)
        figures["logits_bit_equal"] = equal
        if not equal:
            raise RuntimeError(
                f"the model loaded from {folder!r} gives other logits than the one saved there"
            )
    if args.training.do_eval:
        figures["metrics"] = scores(Trainer(fresh, args.training, **parts).evaluate())
    return figures


def _push(folder: str, training) -> None:
    """Uploads a folder as it stands: the very files that were checked."""
    name = training.hub_model_id or os.path.basename(os.path.abspath(training.output_dir))
    api = HfApi(token=training.hub_token)
    repository = api.create_repo(name, private=training.hub_private_repo, exist_ok=True)
    api.upload_folder(repo_id=repository.repo_id, folder_path=folder)


def _write_card(trainer: QuantNoiseTrainer, args: Arguments, folder: str) -> None:
    trainer.create_model_card(tasks="text-classification", dataset=args.data.task_name)
    if args.training.should_save:
        os.replace(
            os.path.join(args.training.output_dir, "README.md"), os.path.join(folder, "README.md")
        )


def _closing_table(results: ResultsFile, args: Arguments) -> str:
    """Dense and small model: MB on disk, times smaller, metric before and after."""
    values, metric = results.values, results.values["metric"]
    dense, small = values["dense"], values.get("compressed")
    kind = "finetuned" if args.training.do_train else "given"
    score = dense.get("metrics", {}).get(metric)
    rows = [Row(f"{kind}, {dense['dtype']}", dense["bytes"] / 1e6, score)]
    if small is not None:
        score = values["reloaded"].get("metrics", {}).get(metric)
        rows.append(Row("compressed, reloaded", small["bytes"] / 1e6, score))
    return closing_table(rows, metric)


def run(args: Arguments) -> dict:
    """Carries out what the command line says; returns what ``results.json`` holds."""
    training = args.training
    # Configs first: a mistake in them is told before anything is read or trained.
    noise_config = args.noise.config(args.options, training.seed)
    small_config = args.options.config(training.seed) if args.options.compress else None
    # Only the final model is pushed, not each checkpoint of the float one.
    push, training.push_to_hub = training.push_to_hub, False
    dense_folder = os.path.join(training.output_dir, "dense")
    small_folder = os.path.join(training.output_dir, "compressed")
    results = ResultsFile(os.path.join(training.output_dir, "results.json"), training.should_save)

    set_seed(training.seed)
    data, tokenizer, model = load_all(args)
    results.add(
        seed=training.seed,
        command=args.command,
        versions=versions(),
        arguments=args.to_dict(),
        noise=noise_config.to_dict() if noise_config and training.do_train else None,
        quantization=small_config.to_dict() if small_config else None,
        examples={
            "train": len(data.train) if data.train else 0,
            "validation": len(data.validation) if data.validation else 0,
        },
        metric=data.headline,
    )
    parts = trainer_parts(data, tokenizer)
    if not training.do_eval:
        parts["eval_dataset"] = None
    noise = noise_config if training.do_train else None
    trainer = QuantNoiseTrainer(model, training, noise, **parts)
    results.add(dense=_finetune(trainer, args, dense_folder))
    if small_config is not None:
        results.add(compressed=_compress(trainer, args, small_config, small_folder, results))
        results.add(reloaded=_reload(trainer, args, parts, small_folder))
    if push and training.should_save:
        _push(small_folder if small_config is not None else dense_folder, training)
    if training.process_index == 0:
        print(f"\n{_closing_table(results, args)}", flush=True)
    return results.values


def main(argv: list[str] | None = None) -> dict:
    """Entry point; ``argv`` defaults to the command line."""
    args = parse_arguments(argv)
    _set_up_logging(args.training)
    return run(args)


if __name__ == "__main__":
    main()
