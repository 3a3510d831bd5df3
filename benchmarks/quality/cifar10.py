"""CIFAR-10 of the image study: decoded once, with held-out training images; MobileNetV1 on it."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass

import pyarrow.parquet as parquet
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification, PreTrainedModel

PIXELS = 48  # images are enlarged to this size: the network halves them five times
PADDING = 4  # pixels of the original image that a random crop moves it by
# Settings are chosen on these images of the training file, which no training run sees.
HELD_OUT, SPLIT_SEED = 5000, 0
CLASSES = 10


class Images(Dataset):
    """Images (n, 3, 32, 32) as bytes with their labels (n,)."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.images[row], self.labels[row]


@dataclass(frozen=True)
class Splits:
    """The training file without the held-out images, these, and the test file."""

    train: Images
    held_out: Images
    test: Images


def load(data_dir: str, cache_dir: str, limit: int | None = None) -> Splits:
    """Return the splits; ``limit`` truncates the training images."""
    images, labels = _decoded(data_dir, cache_dir, "train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held, rest = order[:HELD_OUT], order[HELD_OUT:][:limit]
    return Splits(
        train=Images(images[rest], labels[rest]),
        held_out=Images(images[held], labels[held]),
        test=Images(*_decoded(data_dir, cache_dir, "test")),
    )


def _decoded(data_dir: str, cache_dir: str, split: str) -> tuple[Tensor, Tensor]:
    path = os.path.join(cache_dir, f"cifar10-{split}.pt")
    if not os.path.isfile(path):
        table = parquet.read_table(os.path.join(data_dir, f"{split}.parquet"))
        bytes_of = (Image.open(io.BytesIO(image)) for image in table["image"].to_pylist())
        images = [
            torch.frombuffer(bytearray(each.tobytes()), dtype=torch.uint8) for each in bytes_of
        ]
        stacked = torch.stack(images).view(-1, 32, 32, 3).permute(0, 3, 1, 2).contiguous()
        os.makedirs(cache_dir, exist_ok=True)
        torch.save((stacked, torch.tensor(table["label"].to_pylist())), path)
    return torch.load(path)


def prepare(images: Tensor) -> Tensor:
    """Return the network's input: enlarged, from -1 to 1, in the fastest memory format."""
    scaled = images.float() / 127.5 - 1
    enlarged = F.interpolate(scaled, size=(PIXELS, PIXELS), mode="bilinear", align_corners=False)
    return enlarged.contiguous(memory_format=torch.channels_last)


def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return a training batch: each image mirrored with probability 1/2 and moved at random."""
    images = torch.stack([image for image, _ in rows])
    mirrored = torch.rand(len(rows), 1, 1, 1) < 0.5
    images = torch.where(mirrored, images.flip(3), images)
    padded = F.pad(images.float(), [PADDING] * 4, mode="reflect")
    moves = torch.randint(2 * PADDING + 1, (len(rows), 2)).tolist()
    moved = [each[:, y : y + 32, x : x + 32] for each, (y, x) in zip(padded, moves, strict=True)]
    return {
        "pixel_values": prepare(torch.stack(moved)),
        "labels": torch.stack([label for _, label in rows]),
    }


def load_model(folder: str) -> PreTrainedModel:
    """Return a classifier with one output per class, pretrained or finetuned."""
    model = AutoModelForImageClassification.from_pretrained(
        folder, dtype=torch.float32, num_labels=CLASSES, ignore_mismatched_sizes=True
    )
    return model.to(memory_format=torch.channels_last)


@torch.no_grad()
def logits_of(model: PreTrainedModel, data: Images) -> Tensor:
    """Return the logits (n, 10) of a split."""
    model.eval()
    return torch.cat([model(pixel_values=prepare(part)).logits for part in data.images.split(250)])


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return accuracy, and the mean cross-entropy in nats."""
    accuracy = (logits.argmax(-1) == labels).float().mean().item()
    return {"accuracy": accuracy, "loss": F.cross_entropy(logits, labels).item()}
