"""Data of ``run_glue.py``: sentences and labels from the Hub or from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset, load_dataset
from transformers import PretrainedConfig

from ..configuration.options import option
from .arguments import ModelArguments
from .example_data import FileArguments, check_column, check_minimum, read_table, truncate
from .glue_labels import find_labels

HUB_DATASET = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """A GLUE task: text columns, and metrics (the first one is that of the closing table)."""

    keys: tuple[str, str | None]
    metrics: tuple[str, ...] = ("accuracy",)
    validation_split: str = "validation"


TASKS = {
    "cola": Task(("sentence", None), ("matthews_correlation",)),
    "mnli": Task(("premise", "hypothesis"), validation_split="validation_matched"),
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
class DataArguments(FileArguments):
    """Data to train and evaluate on."""

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
                    "without it, pass --train_file and --validation_file"
                )
        super().__post_init__()
        check_minimum(self, 1, "max_seq_length")
        if self.sentence2_key and not self.sentence1_key:
            raise ValueError(f"--sentence2_key {self.sentence2_key!r} requires --sentence1_key")

    @property
    def task(self) -> Task | None:
        """Task of ``--task_name``, or None."""
        return TASKS[self.task_name] if self.task_name else None

    @property
    def from_files(self) -> bool:
        """Whether the data comes from local files."""
        return bool(self.train_file or self.validation_file)

    @property
    def has_train_data(self) -> bool:
        return bool(self.train_file or (self.task_name and not self.validation_file))


@dataclass
class GlueData:
    """The datasets (or None), their columns, labels and metrics."""

    train: Dataset | None
    validation: Dataset | None
    keys: tuple[str, str | None]
    label_values: dict | None  # label in the data -> id in the model; None for regression
    label_names: list[str] | None  # name of each id, for id2label; None for regression
    metrics: tuple[str, ...]

    @property
    def is_regression(self) -> bool:
        """Whether the labels are continuous values."""
        return self.label_names is None


def _read_hub(args: DataArguments, split: str, model: ModelArguments) -> Dataset:
    name = "train" if split == "train" else args.task.validation_split
    try:
        return load_dataset(
            HUB_DATASET, args.task_name, split=name, cache_dir=model.cache_dir, token=model.token
        )
    except ConnectionError as error:
        raise ConnectionError(
            f"--task_name {args.task_name!r} is loaded from {HUB_DATASET}, but the Hub cannot be "
            "reached; pass local data with --train_file and --validation_file"
        ) from error


def _read_sets(
    args: DataArguments, model: ModelArguments, splits: Sequence[str]
) -> dict[str, Dataset]:
    """Return flag -> dataset, for the splits that the run needs and the files that are passed."""
    if not args.from_files and not args.task_name:
        raise ValueError(
            "no data: pass --train_file and --validation_file, or --task_name (one of "
            f"{', '.join(TASKS)}) to load {HUB_DATASET} from the Hub"
        )
    sets = {}
    for split, switch in (("train", "--do_train"), ("validation", "--do_eval")):
        flag = f"{split}_file"
        if (path := getattr(args, flag)) is not None:
            options = {"download_mode": "force_redownload"} if args.overwrite_cache else {}
            sets[flag] = read_table(flag, path, model.cache_dir, **options)
        elif split in splits and not args.from_files:
            sets[flag] = _read_hub(args, split, model)
        elif split in splits:
            raise ValueError(f"missing --{flag}: {switch} needs it; pass it, or {switch} False")
    return sets


def _is_text(data: Dataset, column: str) -> bool:
    return getattr(data.features[column], "dtype", None) in ("string", "large_string")


def _sentence_keys(data: Dataset, flag: str, args: DataArguments) -> tuple[str, str | None]:
    if args.sentence1_key:
        return args.sentence1_key, args.sentence2_key
    columns = data.column_names
    candidates = [args.task.keys] if args.task else KNOWN_KEYS
    for keys in candidates:
        if all(key in columns for key in keys if key):
            return keys
    texts = [c for c in columns if c != args.label_column and _is_text(data, c)]
    if args.task is None and len(texts) in (1, 2):
        return texts[0], texts[1] if len(texts) == 2 else None
    raise ValueError(
        f"--{flag} {getattr(args, flag)!r} has the columns {columns}: ambiguous which of them are "
        "the sentences; pass --sentence1_key (and --sentence2_key)"
    )


def _check_columns(sets: dict[str, Dataset], keys, args: DataArguments) -> None:
    for flag, data in sets.items():
        source = f"--{flag} {getattr(args, flag)!r}" if args.from_files else HUB_DATASET
        check_column("label_column", args.label_column, data, source)
        for i, key in enumerate(filter(None, keys), 1):
            if key not in data.column_names:
                raise ValueError(
                    f"{source} has no column {key!r}, only {data.column_names}; rename the column, "
                    f"or pass --sentence{i}_key with one that both files have"
                )
            if not _is_text(data, key):
                raise ValueError(
                    f"invalid --sentence{i}_key {key!r}: the column of {source} has "
                    f"{data.features[key]}, expected text"
                )
        for key in (*filter(None, keys), args.label_column):
            if empty := data.data.column(key).null_count:
                raise ValueError(
                    f"{source} has {empty} of {len(data)} rows with an empty column {key!r}; "
                    "remove these rows or fill them in"
                )


def load_glue_data(
    args: DataArguments, model: ModelArguments, config: PretrainedConfig, splits: Sequence[str]
) -> GlueData:
    """Read the datasets of some splits and find sentences and labels.

    The label ids are those of ``config`` if its head has these labels.
    """
    sets = _read_sets(args, model, splits)
    first = next(iter(sets))
    keys = _sentence_keys(sets[first], first, args)
    _check_columns(sets, keys, args)
    values, names = find_labels(
        sets, args.label_column, args.task_name, config, model.ignore_mismatched_sizes
    )
    default = ("pearson", "spearmanr") if names is None else ("accuracy",)
    metrics = args.task.metrics if args.task else default
    if "f1" in metrics and len(names) != 2:
        raise ValueError(
            f"invalid --task_name {args.task_name!r}: its metric F1 needs 2 labels, the data has "
            f"{names}"
        )
    train_set, validation_set = sets.get("train_file"), sets.get("validation_file")
    if train_set is not None and args.shuffle_train_dataset:
        train_set = train_set.shuffle(seed=args.shuffle_seed)
    return GlueData(
        train=truncate(train_set, args.max_train_samples),
        validation=truncate(validation_set, args.max_eval_samples),
        keys=keys,
        label_values=values,
        label_names=names,
        metrics=metrics,
    )
