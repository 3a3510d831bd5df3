"""Fixtures: tiny models, and data to train them on."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The workers of pytest-xdist and their subprocesses share the cores. Set before torch is imported.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from support.tiny import MAKERS, TIED, VOCABULARY, make_model
from transformers.utils import logging


@pytest.fixture(autouse=True)
def _own_warnings():
    """Let each test see the warnings that are issued once in a process."""
    logging.warning_once.cache_clear()


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch):
    """Skip fsync: tests kill processes, but never the machine."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session", autouse=True)
def _quick_collection():
    """Keep modules out of garbage collection, which trainers start and wait for many times."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=list(MAKERS))
def model(request):
    """Each of the tiny models."""
    return make_model(request.param)


@pytest.fixture(params=TIED)
def tied_model(request):
    """Each tiny model whose head is tied to its embeddings."""
    return make_model(request.param)


@pytest.fixture
def input_ids():
    """A batch of token ids, shape (3, 11), none of them padding."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, VOCABULARY, (3, 11), generator=generator)


@pytest.fixture(scope="session")
def parity_data():
    """A small learnable task: is the first token in the upper half of the vocabulary?"""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, VOCABULARY, (96, 8), generator=generator)
    labels = (ids[:, 0] > VOCABULARY // 2).long()
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return Dataset.from_dict({name: tensor.tolist() for name, tensor in data.items()})


@pytest.fixture
def run_python():
    """Return a function that runs a program in a new process, which must succeed."""

    def run(program: str, *arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    return run


@pytest.fixture(scope="session")
def metric_folder():
    """Folder with metrics of evaluate, ``glue`` and ``accuracy``, which load without the Hub."""
    pytest.importorskip("evaluate")
    return Path(__file__).parent / "support" / "metrics"
