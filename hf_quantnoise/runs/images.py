"""Finetune an image classifier with quantization noise, compress it and load it again.

Files are parquet with a column of images (encoded bytes, or ``datasets.Image``) and one of labels.
Convolutions have the paper's blocks: ``--block_size`` for 1 x 1 kernels, the area of larger ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from datasets import Dataset, Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from ..configuration.options import option
from .arguments import Arguments
from .example import Example
from .example_data import (
    NOTHING_TO_DO,
    SplitArguments,
    check_column,
    check_minimum,
    check_not_labels,
    read_table,
    require_filled,
    truncate,
)
from .job import Job
from .known_flags import IMAGES_ELSEWHERE
from .labels import check_labels, labels_in, order_as_in_checkpoint, set_labels
from .metrics import MetricArguments


@dataclass
class ImageArguments(SplitArguments, MetricArguments):
    """Data to train and evaluate on."""

    file_kind: ClassVar[str] = "a parquet file of images"
    auto_class: ClassVar[Any] = AutoModelForImageClassification
    elsewhere: ClassVar[Mapping[str, str]] = IMAGES_ELSEWHERE

    validation_split: str = option("test", "Validation split of the dataset on the Hub.")
    image_column: str = option("image", "Column of the images.")
    label_column: str = option("label", "Column of the labels.")
    image_size: int | None = option(None, "Pixels per side; default: that of the checkpoint.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minimum(self, 1, "image_size")
        check_not_labels(self, "image_column")


def load_images(
    args: ImageArguments, split: str, cache_dir: str | None, token: str | None
) -> Dataset:
    """Return the encoded images, labels and row indices of a split."""
    if (path := args.file(split)) is None:
        rows = args.load_from_hub(split, cache_dir, token)
    else:
        rows = read_table(f"{split}_file", path, cache_dir)
    source = args.dataset_name if path is None else f"--{split}_file {path!r}"
    check_column("image_column", args.image_column, rows, source)
    check_column("label_column", args.label_column, rows, source)
    require_filled(rows, [args.image_column, args.label_column], source)
    rows = rows.select_columns([args.image_column, args.label_column])
    rows = rows.cast_column(args.image_column, Image(decode=False))
    return rows.add_column("row index", range(len(rows)))


def decode(row: dict, column: str):
    """Return the image of a row as a PIL image."""
    try:
        return Image(mode="RGB").decode_example(row[column])
    except Exception as error:  # any type, depending on the format
        raise ValueError(
            f"invalid --image_column {column!r}: cannot decode the image in row {row['row index']} "
            f"({error}); remove the row or replace the image"
        ) from error


def collate(rows: list[dict], processor, args: ImageArguments, ids: dict):
    """Return a batch of prepared images and their label ids."""
    batch = processor([decode(row, args.image_column) for row in rows], return_tensors="pt")
    batch["labels"] = [ids[row[args.label_column]] for row in rows]
    return batch.convert_to_tensors("pt")


def load_processor(args: Arguments):
    """Load the checkpoint's image processor, with the size of ``--image_size``."""
    model = args.model
    processor = AutoImageProcessor.from_pretrained(model.model_name_or_path, **model.hub())
    if (side := args.data.image_size) is None:
        return processor
    square = {"height": side, "width": side}
    processor.size = {"shortest_edge": side} if "shortest_edge" in processor.size else square
    if getattr(processor, "crop_size", None):
        processor.crop_size = square
    return processor


def prepare(args: Arguments) -> Job:
    """Load images, image processor and model."""
    data, model_args = args.data, args.model
    config = model_args.load_config()
    source = model_args.cache_dir, model_args.token
    sets = {split: load_images(data, split, *source) for split in args.splits}
    if not sets:
        raise ValueError(NOTHING_TO_DO)
    found = labels_in(next(iter(sets.values())), data.label_column)
    # Integers below the number of labels of a head are not its labels: ImageNet has 1,000.
    replaces = model_args.ignore_mismatched_sizes
    ids, names = order_as_in_checkpoint(*found, config, replaces, allow_fewer=False)
    check_labels({f"{split}_file": rows for split, rows in sets.items()}, data.label_column, ids)
    set_labels(config, names)
    # After the labels were found, since files may be sorted by label.
    sets = {split: truncate(rows, data.limit(split)) for split, rows in sets.items()}
    compute_metrics, metric = None, "accuracy"
    if args.training.do_eval:
        compute_metrics, metric = data.scoring(("accuracy",), "accuracy", None)
    model = model_args.load_model(args.data.auto_class, config)
    processor = load_processor(args)
    args.training.remove_unused_columns = False  # the collator reads them
    return Job(
        model=model,
        parts={
            "train_dataset": sets.get("train"),
            "eval_dataset": sets.get("validation"),
            "compute_metrics": compute_metrics,
            "processing_class": processor,
            "data_collator": partial(collate, processor=processor, args=data, ids=ids),
        },
        metric=metric,
        task="image-classification",
        **data.evaluated_dataset(),
    )


example = Example(
    ImageArguments, "Finetune an image classifier with quantization noise and compress it.", prepare
)
parse, run, main, script = example.parse, example.run, example.main, example.script
