"""Finetune an image classifier with quantization noise, compress it and load it again.

Files are parquet with a column of images (encoded bytes, or ``datasets.Image``) and one of labels.
Convolutions have the paper's blocks: ``--block_size`` for 1 x 1 kernels, the area of larger ones.

The run is in ``compression_run.py``, the flags are in ``arguments.py``; they can also be passed as
one JSON file.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import ClassVar

from datasets import ClassLabel, Dataset, load_dataset
from PIL import Image, UnidentifiedImageError
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from ..configuration.options import option
from .arguments import Arguments
from .compression_run import Example, Job
from .example_data import SplitArguments, check_minimum, read_table, truncate
from .glue_labels import metrics_function


@dataclass
class ImageArguments(SplitArguments):
    """Data to train and evaluate on."""

    file_kind: ClassVar[str] = "a parquet file of images"

    validation_split: str = option("test", "Validation split of the dataset on the Hub.")
    image_column: str = option("image", "Column of the images.")
    label_column: str = option("label", "Column of the labels.")
    image_size: int | None = option(None, "Pixels per side; default: that of the checkpoint.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minimum(self, 1, "image_size")


def load_images(args: ImageArguments, split: str, cache_dir: str | None) -> Dataset:
    """Return the images and labels of a split, from a file or from the Hub.

    Raises:
        ValueError: naming the flag, if a column is missing or a file cannot be read.
    """
    if (path := args.file(split)) is None:
        name = "train" if split == "train" else args.validation_split
        rows = load_dataset(args.dataset_name, split=name, cache_dir=cache_dir)
    else:
        rows = read_table(f"{split}_file", path, cache_dir)
    for name, column in (("image", args.image_column), ("label", args.label_column)):
        if column not in rows.column_names:
            raise ValueError(
                f"invalid --{name}_column {column!r}: expected one of the columns of "
                f"{path or args.dataset_name}: {', '.join(rows.column_names)}"
            )
    return truncate(rows.select_columns([args.image_column, args.label_column]), args.limit(split))


def label_names(rows: Dataset, column: str) -> list[str]:
    """Return the class names: those of the dataset, or its sorted distinct labels."""
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return feature.names
    values = sorted(set(rows[column]))
    if all(isinstance(value, int) for value in values) and values != list(range(len(values))):
        raise ValueError(
            f"invalid --label_column {column!r}: has the labels {values[:5]}..., expected integers "
            "that count from 0, or names"
        )
    return list(map(str, values))


class ImageCollator:
    """Decodes and prepares images batch by batch, so that only a batch is in memory.

    Args:
        processor: the checkpoint's image processor.
        args: names of the columns.
        ids: class name -> id, for labels that are names.
    """

    def __init__(self, processor, args: ImageArguments, ids: dict[str, int]) -> None:
        self.processor, self.args, self.ids = processor, args, ids

    def __call__(self, rows: list[dict]):
        images = [_decode(row[self.args.image_column]) for row in rows]
        batch = self.processor(images, return_tensors="pt")
        labels = [row[self.args.label_column] for row in rows]
        batch["labels"] = [self.ids[x] if isinstance(x, str) else x for x in labels]
        return batch.convert_to_tensors("pt")


def _decode(value) -> Image.Image:
    """Return an RGB image from encoded bytes, a dict with bytes or path, or an image."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else Image.open(value["path"])
    if isinstance(value, bytes):
        try:
            value = Image.open(io.BytesIO(value))
        except UnidentifiedImageError as error:
            raise ValueError(
                f"an image of {len(value)} bytes cannot be decoded ({error})"
            ) from None
    return value.convert("RGB")


def load_processor(args: Arguments):
    """Load the checkpoint's image processor, with the size of ``--image_size``."""
    processor = AutoImageProcessor.from_pretrained(
        args.model.model_name_or_path, **args.model.hub()
    )
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
    train = validation = None
    if args.needs_train_data:
        train = load_images(data, "train", model_args.cache_dir)
    if args.training.do_eval:
        validation = load_images(data, "validation", model_args.cache_dir)
    if train is None and validation is None:
        raise ValueError("nothing to do: pass --do_train, --do_eval or --stage_epochs above 0")
    names = label_names(train if train is not None else validation, data.label_column)
    ids = {name: index for index, name in enumerate(names)}
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, **model_args.hub())
    config.id2label, config.label2id = dict(enumerate(names)), ids
    model = AutoModelForImageClassification.from_pretrained(
        model_args.model_name_or_path,
        config=config,
        dtype=model_args.dtype,
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
        **model_args.hub(),
    )
    processor = load_processor(args)
    args.training.remove_unused_columns = False  # the collator reads them
    return Job(
        model=model,
        parts={
            "train_dataset": train,
            "eval_dataset": validation,
            "compute_metrics": metrics_function(("accuracy",), is_regression=False),
            "processing_class": processor,
            "data_collator": ImageCollator(processor, data, ids),
        },
        auto_class=AutoModelForImageClassification,
        metric="accuracy",
        task="image-classification",
        dataset=data.dataset_name,
    )


example = Example(
    ImageArguments,
    "Finetune an image classifier with quantization noise and compress it.",
    prepare,
)
parse, run, main = example.parse, example.run, example.main
