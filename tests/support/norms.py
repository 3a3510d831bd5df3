"""Statistics of BatchNorm: a model with every kind of norm that has some, batches, assertions."""

from copy import deepcopy

import torch
from torch import nn
from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

from hf_quantnoise import update_bn_stats
from support.tasks import TASKS

IMAGES = TASKS["resnet"][1]()  # a batch


class Net(nn.Module):
    """One norm that is called twice, one that the data never reach, and frozen ones."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6, momentum=0.9997)
        self.idle, self.still = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
        self.frozen, self.fixed = DetrFrozenBatchNorm2d(6), nn.BatchNorm1d(6, momentum=0.0)
        self.untracked = nn.BatchNorm1d(6, track_running_stats=False)
        self.instance = nn.InstanceNorm1d(6, momentum=0.3, track_running_stats=True)
        self.dropout = nn.Dropout(0.5)

    def train(self, mode=True):
        super().train(mode)
        self.still.eval()
        return self

    def forward(self, x):
        y = self.norm(self.norm(self.layer(self.dropout(x))))
        y = self.untracked(self.fixed(self.still(y)))
        return self.instance(y.T[None].expand(2, 6, -1))


def inputs(n_batches=3):
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(5, 6, generator=generator)} for _ in range(n_batches)]


def stats(model):
    """Return copies of the statistics of a model, by name."""
    return {key: value.clone() for key, value in model.state_dict().items() if "running" in key}


def assert_stats_of(model, batch=IMAGES):
    """Assert that the statistics are those of the weights, with one batch of all examples."""
    fresh = update_bn_stats(deepcopy(model), [batch])
    for key, value in stats(fresh).items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-4, atol=1e-5)
