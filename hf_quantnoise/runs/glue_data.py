"""Data of ``run_glue.py``: sentences and labels from the Hub or from files.

Every mistake a user can make with a file is answered by an error that names the flag, the value
given and what would do.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field, replace

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PretrainedConfig

from .glue_labels import find_labels

logger = logging.getLogger(__name__)

HUB_DATASET = "nyu-mll/glue"
READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
# Only an empty cell is missing: by default the csv reader takes the sentence "null" for nothing.
READER_OPTIONS = {"csv": {"keep_default_na": False, "na_values": [""]}}


@dataclass(frozen=True)
class Task:
    """A GLUE task: its text columns, its metrics (the first is the one in the closing table)."""

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
class DataArguments:
    """What to train and evaluate on."""

    task_name: str | None = field(
        default=None,
        metadata={
            "help": f"GLUE task: {', '.join(TASKS)}. Read from the Hub's {HUB_DATASET}, unless "
            "files are given, which then only take its columns and metric."
        },
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Local training data: a parquet, csv, json or jsonl file."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Local validation data, with the columns of --train_file."}
    )
    sentence1_key: str | None = field(
        default=None, metadata={"help": "Column of the (first) sentence. Default: found by name."}
    )
    sentence2_key: str | None = field(
        default=None, metadata={"help": "Column of the second sentence. Default: found by name."}
    )
    label_column: str = field(
        default="label",
        metadata={"help": "Column of the label. Floats mean regression, all else classes."},
    )
    max_seq_length: int = field(
        default=128, metadata={"help": "Tokens per example; longer ones are truncated."}
    )
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad to --max_seq_length, not to the batch's longest."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use only the first so many training examples."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use only the first so many validation examples."}
    )
    shuffle_train_dataset: bool = field(
        default=False, metadata={"help": "Shuffle before --max_train_samples takes the first ones."}
    )
    shuffle_seed: int = field(
        default=42, metadata={"help": "Seed of --shuffle_train_dataset, whatever --seed is."}
    )
    overwrite_cache: bool = field(
        default=False, metadata={"help": "Read and tokenize anew what the cache holds already."}
    )

    def __post_init__(self) -> None:
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            if self.task_name not in TASKS:
                raise ValueError(
                    f"--task_name {self.task_name!r} is unknown; choose one of {', '.join(TASKS)}, "
                    "or give --train_file and --validation_file"
                )
        for flag in ("max_seq_length", "max_train_samples", "max_eval_samples"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise ValueError(f"--{flag} {value} must be at least 1")
        if self.sentence2_key and not self.sentence1_key:
            raise ValueError(
                f"--sentence2_key {self.sentence2_key!r} needs --sentence1_key beside it"
            )

    @property
    def task(self) -> Task | None:
        """The task of ``--task_name``, or None."""
        return TASKS[self.task_name] if self.task_name else None

    @property
    def from_files(self) -> bool:
        """Whether the data comes from local files."""
        return bool(self.train_file or self.validation_file)


@dataclass
class GlueData:
    """What was read: the sets (None where there is none), their columns, labels and metrics.

    Attributes:
        label_values: label in the data -> id in the model; None for regression.
        label_names: name of each id, for ``id2label``; None for regression.
    """

    train: Dataset | None
    validation: Dataset | None
    keys: tuple[str, str | None]
    label_column: str
    label_values: dict | None
    label_names: list[str] | None
    metrics: tuple[str, ...]

    @property
    def is_regression(self) -> bool:
        """Whether the labels are numbers to be approximated."""
        return self.label_names is None

    @property
    def num_labels(self) -> int:
        """Outputs of the head."""
        return 1 if self.label_names is None else len(self.label_names)

    @property
    def headline(self) -> str:
        """The metric of the closing table."""
        return self.metrics[0]


# ---- reading -------------------------------------------------------------------------------------


def _read_file(flag: str, path: str, args: DataArguments, cache_dir: str | None) -> Dataset:
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"--{flag} {path!r} is no file; give the path of a {', '.join(READERS)} file"
        )
    extension = os.path.splitext(path)[1].lower()
    if extension not in READERS:
        raise ValueError(
            f"--{flag} {path!r}: the extension {extension!r} is unknown; "
            f"give a {', '.join(READERS)} file"
        )
    reader = READERS[extension]
    try:
        return load_dataset(
            reader,
            data_files={"train": path},
            split="train",
            cache_dir=cache_dir,
            download_mode="force_redownload" if args.overwrite_cache else None,
            **READER_OPTIONS.get(reader, {}),
        )
    except (DatasetGenerationError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise ValueError(
            f"--{flag} {path!r} cannot be read as {reader}, or holds no rows "
            f"({error.__cause__ or error}); give a {reader} file with examples"
        ) from error


def _read_hub(args: DataArguments, split: str, cache_dir: str | None, token) -> Dataset:
    try:
        return load_dataset(
            HUB_DATASET, args.task_name, split=split, cache_dir=cache_dir, token=token
        )
    except ConnectionError as error:
        raise ConnectionError(
            f"--task_name {args.task_name!r} is read from the Hub's {HUB_DATASET}, which cannot be "
            "reached; give local data with --train_file and --validation_file"
        ) from error


def _read_sets(
    args: DataArguments, train: bool, validation: bool, cache_dir: str | None, token
) -> dict[str, Dataset]:
    """Flag or split name -> dataset, for the sets that the run needs."""
    if not args.from_files and not args.task_name:
        raise ValueError(
            "no data: give --train_file and --validation_file, or --task_name (one of "
            f"{', '.join(TASKS)}) to read {HUB_DATASET} from the Hub"
        )
    sets = {}
    for flag, wanted, why in (
        ("train_file", train, "training (--do_train)"),
        ("validation_file", validation, "evaluation (--do_eval)"),
    ):
        path = getattr(args, flag)
        if not args.from_files and wanted:
            split = "train" if flag == "train_file" else args.task.validation_split
            sets[flag] = _read_hub(args, split, cache_dir, token)
        elif path is not None:
            sets[flag] = _read_file(flag, path, args, cache_dir)
        elif wanted:
            switch = "--do_train" if flag == "train_file" else "--do_eval"
            raise ValueError(
                f"--{flag} is missing, and {why} needs it; give it, or turn it off with "
                f"{switch} False"
            )
    return sets


# ---- columns -------------------------------------------------------------------------------------


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
        f"--{flag} {getattr(args, flag)!r} has the columns {columns}, and it is not plain which of "
        "them hold the sentences; name them with --sentence1_key (and --sentence2_key)"
    )


def _check_columns(sets: dict[str, Dataset], keys, args: DataArguments) -> None:
    for flag, data in sets.items():
        source = f"--{flag} {getattr(args, flag)!r}" if args.from_files else f"{HUB_DATASET}"
        if args.label_column not in data.column_names:
            raise ValueError(
                f"{source} has no label column {args.label_column!r}; its columns are "
                f"{data.column_names}: name the one with --label_column"
            )
        for number, key in enumerate(keys, 1):
            if key is None:
                continue
            if key not in data.column_names:
                raise ValueError(
                    f"{source} has no column {key!r}; its columns are {data.column_names}. "
                    f"--train_file and --validation_file must share them: rename the column, "
                    f"or name one that both have with --sentence{number}_key"
                )
            if not _is_text(data, key):
                raise ValueError(
                    f"--sentence{number}_key: column {key!r} of {source} holds "
                    f"{data.features[key]}, not text; name a column of strings"
                )
        for key in (*filter(None, keys), args.label_column):
            if empty := data.data.column(key).null_count:
                raise ValueError(
                    f"{source} has {empty} of {len(data)} rows with nothing in column {key!r}; "
                    "remove these rows or fill them in"
                )


# ---- the whole -----------------------------------------------------------------------------------


def load_glue_data(
    args: DataArguments,
    config: PretrainedConfig,
    *,
    train: bool = True,
    validation: bool = True,
    ignore_mismatched_sizes: bool = False,
    cache_dir: str | None = None,
    token: str | None = None,
) -> GlueData:
    """Reads the sets and finds sentences and labels.

    Args:
        args: what the user asked for.
        config: the checkpoint's config; its label ids hold where its head knows the labels.
        train, validation: which sets the run cannot do without.
        ignore_mismatched_sizes: let a head for other labels be replaced.

    Raises:
        FileNotFoundError, ValueError: naming the flag, the value given and what would do.
        ConnectionError: where the Hub is needed and cannot be reached.
    """
    sets = _read_sets(args, train, validation, cache_dir, token)
    first = next(iter(sets))
    keys = _sentence_keys(sets[first], first, args)
    _check_columns(sets, keys, args)
    values, names = find_labels(
        sets, args.label_column, args.task_name, config, ignore_mismatched_sizes
    )
    default = ("pearson", "spearmanr") if names is None else ("accuracy",)
    metrics = args.task.metrics if args.task else default
    if "f1" in metrics and len(names) != 2:
        raise ValueError(
            f"--task_name {args.task_name!r} is scored by F1, which needs 2 labels; "
            f"the data has {names}"
        )
    train_set, validation_set = sets.get("train_file"), sets.get("validation_file")
    if train_set is not None and args.shuffle_train_dataset:
        train_set = train_set.shuffle(seed=args.shuffle_seed)
    return GlueData(
        train=_first(train_set, args.max_train_samples),
        validation=_first(validation_set, args.max_eval_samples),
        keys=keys,
        label_column=args.label_column,
        label_values=values,
        label_names=names,
        metrics=metrics,
    )


def _first(data: Dataset | None, count: int | None) -> Dataset | None:
    return data if data is None or count is None else data.select(range(min(count, len(data))))


def tokenize(data: GlueData, tokenizer, args: DataArguments, model_limit: int | None) -> GlueData:
    """The same data with its sets tokenized (``input_ids``, ..., ``label``).

    Args:
        model_limit: most positions of the model; None where its config names none.
    """
    limits = [args.max_seq_length, tokenizer.model_max_length, model_limit or args.max_seq_length]
    length = min(limits)
    if length < args.max_seq_length:
        logger.warning("--max_seq_length %d: the model takes %d.", args.max_seq_length, length)

    raw_label = f"raw {data.label_column}"

    def encode(examples):
        texts = [examples[key] for key in data.keys if key]
        encoded = tokenizer(
            *texts,
            padding="max_length" if args.pad_to_max_length else False,
            max_length=length,
            truncation=True,
        )
        labels = examples[raw_label]
        encoded["label"] = [
            float(label) if data.is_regression else data.label_values[label] for label in labels
        ]
        return encoded

    def apply(dataset: Dataset | None) -> Dataset | None:
        if dataset is None:
            return None
        # Under its old name map would cast the ids back to the type of the labels in the file.
        dataset = dataset.rename_column(data.label_column, raw_label)
        return dataset.map(
            encode,
            batched=True,
            remove_columns=dataset.column_names,
            load_from_cache_file=not args.overwrite_cache,
            desc="Tokenizing",
        )

    return replace(data, train=apply(data.train), validation=apply(data.validation))
