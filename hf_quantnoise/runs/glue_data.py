"""Data of ``run_glue.py``: sentences and labels from the Hub or from files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from datasets import Dataset, load_dataset
from transformers import AutoModelForSequenceClassification, PretrainedConfig

from ..configuration.options import option
from .arguments import ModelArguments
from .example_data import (
    NOTHING_TO_DO,
    FileArguments,
    check_column,
    check_minimum,
    check_not_labels,
    check_text,
    is_text,
    read_table,
    require_filled,
    truncate,
)
from .known_flags import GLUE_ELSEWHERE
from .labels import find_labels, labels_of_checkpoint
from .metrics import MetricArguments

HUB_DATASET = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """A GLUE task: text columns, and metrics (the first one is that of the closing table)."""

    keys: tuple[str, str | None]
    metrics: tuple[str, ...] = ("accuracy",)
    # Splits on the Hub besides those of the usual names: split -> suffix of metrics -> name.
    splits: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def hub_splits(self, split: str) -> Mapping[str, str]:
        """Return the names on the Hub of a split, by the suffix of their metrics."""
        return self.splits.get(split, {"": split})


_MNLI = {
    split: {"": f"{split}_matched", "_mm": f"{split}_mismatched"}
    for split in ("validation", "test")
}
TASKS = {
    "cola": Task(("sentence", None), ("matthews_correlation",)),
    "mnli": Task(("premise", "hypothesis"), splits=_MNLI),
    "mrpc": Task(("sentence1", "sentence2"), ("f1", "accuracy")),
    "qnli": Task(("question", "sentence")),
    "qqp": Task(("question1", "question2"), ("f1", "accuracy")),
    "rte": Task(("sentence1", "sentence2")),
    "sst2": Task(("sentence", None)),
    "stsb": Task(("sentence1", "sentence2"), ("pearson", "spearmanr")),
    "wnli": Task(("sentence1", "sentence2")),
}
KNOWN_KEYS = (*dict.fromkeys(task.keys for task in TASKS.values() if task.keys[1]),)
KNOWN_KEYS += (("sentence", None), ("text", None))


@dataclass
class DataArguments(FileArguments, MetricArguments):
    """Data to train and evaluate on, and to predict."""

    auto_class: ClassVar[Any] = AutoModelForSequenceClassification
    elsewhere: ClassVar[Mapping[str, str]] = GLUE_ELSEWHERE
    predicts: ClassVar[bool] = True

    test_file: str | None = option(
        None, "File of --do_predict, which writes predict_results_TASK.txt. Needs no labels."
    )
    max_predict_samples: int | None = option(None, "Truncate the test data to N examples.")
    task_name: str | None = option(
        None,
        f"GLUE task: {', '.join(TASKS)}. Loaded from {HUB_DATASET} on the Hub, unless files are "
        "passed: then only its columns and metrics are used.",
    )
    sentence1_key: str | None = option(None, "Column of the sentence; default: found by name.")
    sentence2_key: str | None = option(None, "Column of a second sentence; default: found by name.")
    label_column: str = option("label", "Column of labels; floats mean regression, others classes.")
    max_seq_length: int = option(128, "Maximum number of tokens; longer examples are truncated.")
    pad_to_max_length: bool = option(
        False, "Pad to --max_seq_length instead of the longest example of the batch."
    )
    shuffle_train_dataset: bool = option(False, "Shuffle before --max_train_samples is applied.")
    shuffle_seed: int = option(42, "Seed of --shuffle_train_dataset; independent of --seed.")
    overwrite_cache: bool = option(False, "Ignore cached data: read and tokenize again.")

    def __post_init__(self) -> None:
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            if self.task_name not in TASKS:
                raise ValueError(
                    f"invalid --task_name {self.task_name!r}: expected one of {', '.join(TASKS)}; "
                    "without it, pass --validation_file (--train_file to train)"
                )
        super().__post_init__()
        check_minimum(self, 1, "max_seq_length", "max_predict_samples")
        if self.sentence2_key and not self.sentence1_key:
            raise ValueError(f"--sentence2_key {self.sentence2_key!r} requires --sentence1_key")
        check_not_labels(self, "sentence1_key", "sentence2_key")

    @property
    def task(self) -> Task | None:
        """Task of ``--task_name``, or None."""
        return TASKS[self.task_name] if self.task_name else None

    @property
    def from_files(self) -> bool:
        """Whether the data comes from local files."""
        return bool(self.train_file or self.validation_file or self.test_file)

    @property
    def has_train_data(self) -> bool:
        return bool(self.train_file or (self.task_name and not self.from_files))

    def limit(self, split: str) -> int | None:
        return self.max_predict_samples if split == "test" else super().limit(split)


@dataclass
class GlueData:
    """The datasets (or None), their columns, labels and metrics.

    ``mismatched`` and ``test`` have more than one set for MNLI, by the suffix of their metrics.
    """

    train: Dataset | None
    validation: Dataset | None
    mismatched: dict[str, Dataset]
    test: dict[str, Dataset]
    keys: tuple[str, str | None]
    label_values: dict | None  # label in the data -> id in the model; None for regression
    label_names: list[str] | None  # name of each id, for id2label; None for regression
    metrics: tuple[str, ...]
    metric_module: tuple[str, str | None]  # of evaluate, with these metrics; and its configuration

    @property
    def is_regression(self) -> bool:
        """Whether the labels are continuous values."""
        return self.label_names is None


def _read_hub(args: DataArguments, name: str, model: ModelArguments) -> Dataset:
    try:
        return load_dataset(
            HUB_DATASET, args.task_name, split=name, cache_dir=model.cache_dir, token=model.token
        )
    except ConnectionError as error:
        raise ConnectionError(
            f"--task_name {args.task_name!r} is loaded from {HUB_DATASET}, but the Hub cannot be "
            "reached; pass local data with --validation_file (--train_file to train)"
        ) from error


def _read_sets(
    args: DataArguments, model: ModelArguments, splits: Sequence[str]
) -> dict[str, Dataset]:
    """Return flag -> dataset, for the splits that the run needs and the files that are passed."""
    if not args.from_files and not args.task_name:
        raise ValueError(
            "no data: pass --validation_file (--train_file to train), or --task_name (one of "
            f"{', '.join(TASKS)}) to load {HUB_DATASET} from the Hub"
        )
    sets = {}
    switches = {"train": "--do_train", "validation": "--do_eval", "test": "--do_predict"}
    for split, switch in switches.items():
        flag = f"{split}_file"
        if (path := getattr(args, flag)) is not None:
            options = {"download_mode": "force_redownload"} if args.overwrite_cache else {}
            sets[flag] = read_table(flag, path, model.cache_dir, **options)
        elif split in splits and not args.from_files:
            for suffix, name in args.task.hub_splits(split).items():
                sets[flag + suffix] = _read_hub(args, name, model)
        elif split in splits:
            raise ValueError(f"missing --{flag}: {switch} needs it; pass it, or {switch} False")
    return sets


def _sentence_keys(data: Dataset, flag: str, args: DataArguments) -> tuple[str, str | None]:
    if args.sentence1_key:
        return args.sentence1_key, args.sentence2_key
    columns = data.column_names
    candidates = [args.task.keys] if args.task else KNOWN_KEYS
    for keys in candidates:
        if all(key in columns for key in keys if key):
            return keys
    texts = [c for c in columns if c != args.label_column and is_text(data, c)]
    if args.task is None and len(texts) in (1, 2):
        return texts[0], texts[1] if len(texts) == 2 else None
    raise ValueError(
        f"--{flag} {getattr(args, flag)!r} has the columns {columns}: ambiguous which of them are "
        "the sentences; pass --sentence1_key (and --sentence2_key)"
    )


def _check_columns(sets: dict[str, Dataset], keys, args: DataArguments) -> None:
    for flag, data in sets.items():
        source = f"--{flag} {getattr(args, flag)!r}" if args.from_files else HUB_DATASET
        columns = [*filter(None, keys)]
        if not flag.startswith("test"):
            check_column("label_column", args.label_column, data, source)
            columns.append(args.label_column)
        for i, key in enumerate(filter(None, keys), 1):
            if key not in data.column_names:
                raise ValueError(
                    f"{source} has no column {key!r}, only {data.column_names}; rename the column, "
                    f"or pass --sentence{i}_key with one that both files have"
                )
            check_text(f"sentence{i}_key", key, data, source)
        require_filled(data, columns, source)


def load_glue_data(
    args: DataArguments, model: ModelArguments, config: PretrainedConfig, splits: Sequence[str]
) -> GlueData:
    """Read the datasets of some splits and find sentences and labels.

    The label ids are those of ``config`` if its head has these labels.
    """
    sets = _read_sets(args, model, splits)
    if not sets:
        raise ValueError(NOTHING_TO_DO)
    first = next(iter(sets))
    keys = _sentence_keys(sets[first], first, args)
    _check_columns(sets, keys, args)
    labelled = {flag: rows for flag, rows in sets.items() if not flag.startswith("test")}
    if labelled:
        values, names = find_labels(
            labelled, args.label_column, args.task_name, config, model.ignore_mismatched_sizes
        )
    else:
        values, names = labels_of_checkpoint(args.task_name, config)
    default = ("pearson", "spearmanr") if names is None else ("accuracy",)
    metrics = args.task.metrics if args.task else default
    if "f1" in metrics and len(names or ()) != 2:
        raise ValueError(
            f"invalid --task_name {args.task_name!r}: its metric F1 needs 2 labels, the data has "
            f"{names}"
        )
    if args.shuffle_train_dataset and "train_file" in sets:
        sets["train_file"] = sets["train_file"].shuffle(seed=args.shuffle_seed)
    for flag, rows in sets.items():
        sets[flag] = truncate(rows, args.limit(flag.partition("_")[0]))
    return GlueData(
        train=sets.get("train_file"),
        validation=sets.get("validation_file"),
        mismatched=_by_suffix(sets, "validation_file_"),
        test=_by_suffix(sets, "test_file"),
        keys=keys,
        label_values=values,
        label_names=names,
        metrics=metrics,
        metric_module=_metric_module(args.task_name, is_regression=names is None),
    )


def _metric_module(task_name: str | None, is_regression: bool) -> tuple[str, str | None]:
    if task_name is None and not is_regression:
        return "accuracy", None
    return "glue", task_name or "stsb"


def _by_suffix(sets: dict[str, Dataset], start: str) -> dict[str, Dataset]:
    """Return the sets of one split, by the suffix of their metrics: ``""``, ``"_mm"``."""
    return {
        flag.partition("_file")[2]: rows for flag, rows in sets.items() if flag.startswith(start)
    }
