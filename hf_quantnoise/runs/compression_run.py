"""The run of all examples: finetune, evaluate, compress, save, reload, print a table.

``out/dense`` is the finetuned model, ``out/compressed`` the compressed one, ``out/results.json``
has all results. With ``--do_train False`` the checkpoint is compressed as it is. ``out/noise`` has
the checkpoints of a training with noise after the finetuning.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from copy import copy

import torch
from transformers import PreTrainedModel, Trainer, set_seed

from ..compression import check_compression, check_plan
from ..compression.reporting.console import is_quiet, silence_if_quiet
from ..hub.card import LATENT
from ..repository import CARD, create_repository, upload_model
from ..size import size_report
from ..trainer import QuantNoiseTrainer
from .arguments import Arguments
from .closing_table import Row, closing_table, weights_mb
from .folders import COMPRESSED, DENSE, NOISE, check_folders, forget_earlier_run
from .job import Job
from .labels import check_teacher, with_same_labels
from .post_training import train_with_noise
from .results import ResultsFile, versions
from .teacher import check_outputs, load_teacher


@torch.no_grad()
def logits_equal(one, other, collator, rows, device) -> bool:
    """Whether two models give bit-equal logits on some tokenized rows."""
    rows = collator([dict(row) for row in rows])
    batch = {name: tensor.to(device) for name, tensor in rows.items() if name != "labels"}
    first, second = (model.to(device).eval()(**batch).logits for model in (one, other))
    return torch.equal(first, second)


class Run:
    """A run: its trainer, and the results so far."""

    def __init__(self, args: Arguments, prepare: Callable[[Arguments], Job]) -> None:
        self.args, self.training = args, args.training
        training, self.resume = args.training, args.flags.resume_compression
        self.quantization = args.quantization if args.flags.compress else None
        self.results = ResultsFile(training.output_dir, training.should_save)
        teacher = args.model.load_teacher_config(args.flags.teacher_name_or_path)
        check_folders(args)
        args.require_train_data()
        if self.resume:
            self.results.read_dense(args.to_dict())
            training.do_train = False
        uses_noise = self.is_post_trained or training.do_train or args.compression.keep_noise
        noise = args.noise if uses_noise else None
        # Only the final model is pushed, not each checkpoint of the dense one.
        push_at_end, training.push_to_hub = training.push_to_hub, False

        set_seed(training.seed)
        self.job = job = prepare(args)
        if teacher is not None and job.task != "text-generation":  # which has no labels
            check_teacher(teacher, job.model.config)
        if self.resume:
            # Finetuned: compression may have been interrupted before it saved the model itself.
            job.model = with_same_labels(self.load_dense(), job.model.config)
        if self.quantization is not None:
            check_plan(job.model, self.quantization)
        sets = {"train": job.parts["train_dataset"], "validation": job.parts["eval_dataset"]}
        self.results.add(
            seed=training.seed,
            command=args.command,
            versions=versions(),
            arguments=args.to_dict(),
            examples={name: len(rows) if rows else 0 for name, rows in sets.items()},
            metric=job.metric,
            noise=noise and noise.to_dict(),
            quantization=self.quantization and self.quantization.to_dict(),
        )
        if not training.do_eval:
            job.parts["eval_dataset"] = None
        self.trainer = QuantNoiseTrainer(
            job.model,
            training,
            None if self.is_post_trained else noise,
            compression_args=args.compression,
            **job.parts,
        )
        if self.quantization is not None:
            check_compression(self.trainer, self.quantization, args.compression)
            check_outputs(args, self.trainer)
        # Before the training, which would be wasted if it cannot be created.
        self.repository = self.create_repository() if push_at_end else None

    @property
    def is_post_trained(self) -> bool:
        """Whether the noise is trained after the finetuning, not in it."""
        return self.args.flags.noise_after_finetuning > 0

    def folder(self, name: str) -> str:
        return os.path.join(self.training.output_dir, name)

    def show(self, text: str) -> None:
        """Print a text on rank 0, unless the log level shows errors only."""
        if self.training.process_index == 0 and not is_quiet(self.training):
            print(text, flush=True)

    def load_dense(self) -> PreTrainedModel:
        """Load the finetuned model."""
        auto_class, dtype = self.args.data.auto_class, self.args.model.dtype
        return auto_class.from_pretrained(self.folder(DENSE), dtype=dtype)

    def carry_out(self) -> dict:
        """Finetune, compress, reload and push; return the content of ``results.json``."""
        if self.args.recipe is not None:
            self.show(self.args.recipe)
        if not self.resume:
            forget_earlier_run(self.training)
            self.results.add(dense=self.finetune())
        if self.quantization is not None:
            if self.is_post_trained:
                self.results.add(noise_training=self.train_with_noise())
            self.results.add(compressed=self.compress())
            self.results.add(reloaded=self.reload())
        elif self.training.do_predict:
            self.results.add(predictions=self.predict(self.trainer))
        if self.repository is not None:
            name = DENSE if self.quantization is None else COMPRESSED
            self.push(self.folder(name), self.repository)
        if self.training.process_index == 0:
            print(f"\n{self.closing_table()}", flush=True)
        return self.results.values

    def finetune(self) -> dict:
        """Train, evaluate and save the dense model; return its results."""
        training, trainer = self.training, self.trainer
        results: dict = {"dtype": str(trainer.model.dtype).removeprefix("torch.")}
        noise = trainer.qn_config
        results["latent"] = bool(training.do_train and noise and noise.trains_latent_weights)
        start = time.perf_counter()
        if training.do_train:
            output = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
            results["training"] = output.metrics
        results["seconds"] = time.perf_counter() - start
        if training.do_eval:
            results["metrics"] = self.job.scores(trainer)
        trainer.save_model(self.folder(DENSE))
        training.distributed_state.wait_for_everyone()  # rank 0 writes what all ranks read
        results["bytes"] = round(1e6 * weights_mb(self.folder(DENSE)))
        return results

    def train_with_noise(self) -> dict:
        """Train the finetuned model with noise; return the metrics.

        The trainer of the finetuning is replaced by the one that compresses the result.
        """
        args, teacher = self.args, None
        if args.compression.distill:
            teacher = load_teacher(args) or self.load_dense()
        self.trainer, self.quantization, results = train_with_noise(
            args, self.load_dense(), teacher, self.folder(NOISE), self.resume, self.job.parts
        )
        noise = self.trainer.qn_config
        self.results.add(noise=noise.to_dict(), quantization=self.quantization.to_dict())
        self.job.model = self.trainer.model  # frees the finetuned one
        return results

    def compress(self) -> dict:
        """Compress in stages and save; return the results of the compressed model."""
        args, trainer, folder = self.args, self.trainer, self.folder(COMPRESSED)
        teacher = None if self.is_post_trained else load_teacher(args)
        start = time.perf_counter()
        model = trainer.compress(
            self.quantization,
            args.compression,
            teacher=teacher,
            report=lambda _: self.results.add(stages_so_far=trainer.compression_history),
            resume_from_checkpoint=self.resume,
        )
        del self.results.values["stages_so_far"]  # now part of the results below
        results = {"seconds": time.perf_counter() - start, "stages": trainer.compression_history}
        if self.training.should_save:
            model.save_pretrained(folder)  # with the trainer's processing_class
        self.write_card(folder)
        self.training.distributed_state.wait_for_everyone()
        report = size_report(model)
        self.show(f"\n{report}")
        results["bytes"] = round(1e6 * weights_mb(folder))
        results["reported_bytes"] = report.total.disk_bytes
        return results

    def reload(self) -> dict:
        """Load the compressed model, compare its logits, and evaluate it."""
        folder, parts, results = self.folder(COMPRESSED), self.job.parts, {}
        loaded = self.args.data.auto_class.from_pretrained(folder)
        examples = parts["eval_dataset"] or parts["train_dataset"]
        if examples is not None:
            rows = examples.select(range(min(32, len(examples))))
            device, collator = self.training.device, parts["data_collator"]
            equal = logits_equal(self.trainer.model, loaded, collator, rows, device)
            results["logits_bit_equal"] = equal
            if not equal:
                raise RuntimeError(
                    f"the model loaded from {folder!r} has other logits than the model in memory"
                )
        trainer = Trainer(loaded, self.training, **parts)
        silence_if_quiet(trainer)
        if self.training.do_eval:
            results["metrics"] = self.job.scores(trainer)
        if self.training.do_predict:
            results["predictions"] = self.predict(trainer)
        return results

    def predict(self, trainer: Trainer) -> list[str]:
        """Write a file of predictions for each test set; return the files."""
        files = []
        trainer.args = copy(trainer.args)
        trainer.args.train_sampling_strategy = "sequential"  # group_by_length sorts these, too
        for name, rows in self.job.test_datasets.items():
            predictions = trainer.predict(rows, metric_key_prefix="predict").predictions
            texts = enumerate(self.job.prediction_texts(predictions))
            lines = ["index\tprediction", *(f"{index}\t{text}" for index, text in texts)]
            files.append(os.path.join(self.training.output_dir, f"{name}.txt"))
            if self.training.should_save:
                with open(files[-1], "w", encoding="utf-8") as file:
                    file.write("\n".join(lines) + "\n")
        return files

    def create_repository(self) -> str | None:
        """Create the repository of ``--push_to_hub``; return its name, or None on other ranks."""
        training = self.training
        if not training.should_save:
            return None
        name = training.hub_model_id or os.path.basename(os.path.abspath(str(training.output_dir)))
        return create_repository(
            name,
            private=training.hub_private_repo,
            token=training.hub_token,
            revision=training.hub_revision,
        )

    def push(self, folder: str, repository: str) -> None:
        """Upload the files that were checked, with a model card that names the repository."""
        self.trainer.hub_model_id = repository
        self.write_card(folder)
        training = self.training
        upload_model(repository, folder, token=training.hub_token, revision=training.hub_revision)

    def write_card(self, folder: str) -> None:
        self.trainer.card_template = self.args.flags.card_template
        dense = self.results.values["dense"]
        if not dense.get("latent"):
            metrics = dense.get("metrics", {}).items()
            self.trainer.dense_metrics = {f"eval_{name}": value for name, value in metrics}
        self.trainer.create_model_card(**self.job.card_facts())
        if self.training.should_save:
            os.replace(self.folder(CARD), os.path.join(folder, CARD))
            self.trainer.quantnoise_card().copy_plot(folder)

    def closing_table(self) -> str:
        """Return the table of dense and compressed model: MB on disk, ratio and metric."""
        values, metric = self.results.values, self.job.metric
        dense, compressed = values["dense"], values.get("compressed")
        kind = "finetuned" if "training" in dense else "given"
        if dense.get("latent"):  # trained with noise of rate 1, scored without: not a baseline
            kind = LATENT
        metrics = [metric, *(metric + suffix for suffix in self.job.more_eval_datasets)]

        def row(name: str, size: int, scores: dict) -> Row:
            score, *more = map(scores.get, metrics)
            return Row(name, size / 1e6, score, tuple(more))

        rows = [row(f"{kind}, {dense['dtype']}", dense["bytes"], dense.get("metrics", {}))]
        if compressed is not None:
            scores = values["reloaded"].get("metrics", {})
            rows.append(row("compressed, reloaded", compressed["bytes"], scores))
        return closing_table(rows, *metrics)
