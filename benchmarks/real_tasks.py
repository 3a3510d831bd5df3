"""Tasks of the benchmarks: the example that runs them, their data and common settings."""

from __future__ import annotations

import os
from dataclasses import dataclass

import results_file  # noqa: F401  (adds the examples to sys.path)

import run_clm  # isort: skip
import run_glue  # isort: skip
import run_image_classification  # isort: skip


@dataclass(frozen=True)
class RealTask:
    """An example and its settings.

    Attributes:
        parse, run: functions of the example.
        metric: name of its metric.
        files: names of the training and validation files in ``--data_dir``.
        flags: settings of all rows.
        higher_is_better: whether the metric is a fraction where 1 is best, shown in percent.
    """

    parse: object
    run: object
    metric: str
    files: tuple[str, str]
    flags: str
    higher_is_better: bool = True

    def score(self, value: float) -> float:
        """Return a value of the metric as shown in tables."""
        return 100 * value if self.higher_is_better else value

    def common_flags(self, data_dir: str, output_dir: str) -> list[str]:
        """Return the flags for data, output and logging, which do not change the results."""
        files = [os.path.join(data_dir, name) for name in self.files]
        return [
            *("--output_dir", output_dir, "--train_file", files[0], "--validation_file", files[1]),
            *("--save_strategy", "no", "--per_device_eval_batch_size", "64"),
            *("--dataloader_pin_memory", "False", "--disable_tqdm", "True"),
            *("--logging_steps", "1000"),
            *(("--metrics", "sklearn") if self.metric == "accuracy" else ()),
        ]


TASKS = {
    "text": RealTask(
        parse=run_clm.parse,
        run=run_clm.run,
        metric="perplexity",
        files=("train.txt", "valid.txt"),
        flags="--sequence_length 256 --max_train_samples 1000 --max_eval_samples 200 "
        "--num_train_epochs 2 --learning_rate 2e-3 --per_device_train_batch_size 16",
        higher_is_better=False,
    ),
    "images": RealTask(
        parse=run_image_classification.parse,
        run=run_image_classification.run,
        metric="accuracy",
        files=("train.parquet", "test.parquet"),
        flags="--image_size 64 --ignore_mismatched_sizes --max_train_samples 3000 "
        "--max_eval_samples 1000 --num_train_epochs 2 --learning_rate 1e-3 "
        "--per_device_train_batch_size 32",
    ),
    "sentences": RealTask(
        parse=run_glue.parse,
        run=run_glue.run,
        metric="accuracy",
        files=("train.parquet", "dev.parquet"),
        flags="--task_name sst2 --shuffle_train_dataset True --max_train_samples 10000 "
        "--max_seq_length 64 --num_train_epochs 2 --learning_rate 5e-5 "
        "--per_device_train_batch_size 32 --train_sampling_strategy group_by_length",
    ),
}
