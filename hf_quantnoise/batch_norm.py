"""Statistics of BatchNorm, measured again for the weights that a model has now.

Training averages them over batches, with the noisy weights of section 4. Evaluation uses the
original or the packed weights, which they do not fit: a network can be at chance until they are
measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .argument_checks import read_batches, require_model, run_batch
from .distributed import is_distributed, raise_on_all_ranks, sum_over_ranks
from .modeling import packed_layers
from .modeling.activations import without_rounding
from .module_modes import evaluating

logger = logging.get_logger(__name__)

# Layer -> mean, variance, and number of batches that they are averages of.
Statistics = dict[Any, tuple[Tensor, Tensor, int]]


def tracking_norms(model: nn.Module) -> list[nn.Module]:
    """Return the modules that average statistics of their inputs in training.

    These are ``BatchNorm`` and ``SyncBatchNorm``, ``InstanceNorm`` with ``track_running_stats``,
    and other classes with the same attributes. Frozen ones are omitted: those without these
    attributes (DETR's), with momentum 0, and those that ``model.train()`` leaves in eval mode.
    """
    norms = [module for module in model.modules() if _tracks(module)]
    if norms:
        with evaluating(model):
            model.train()
            norms = [norm for norm in norms if norm.training]
    return norms


def _tracks(module: nn.Module) -> bool:
    statistics = (getattr(module, f"running_{name}", None) for name in ("mean", "var"))
    return (
        bool(getattr(module, "track_running_stats", False))
        and getattr(module, "momentum", 0) != 0
        and all(isinstance(each, Tensor) for each in statistics)
    )


def warn_without_data(model: nn.Module, reason: str) -> None:
    """Warn that statistics of BatchNorm stay as they are, if a model that is packed has any."""
    if tracking_norms(model):
        logger.warning(
            "the statistics of BatchNorm are those of the weights before packing and may not fit "
            "the packed ones, since %s", reason,
        )  # fmt: skip


def update_bn_stats(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    forward: Callable[[Any], object] | None = None,
) -> nn.Module:
    """Replace the statistics of BatchNorm by their averages over some batches, in place.

    The weights are those of evaluation: without noise, or packed. All other modules are in eval
    mode, so dropout is off. Call it after training with noise in your own loop, before you evaluate
    or quantize the model; the trainer and the callback do this by themselves. Each layer's
    ``num_batches_tracked`` becomes the number of batches. Layers that no batch reaches and frozen
    ones keep their statistics. In a distributed run all ranks must call it (with ``SyncBatchNorm``,
    with equally many batches); the statistics are averaged over the batches of all ranks.

    Args:
        model: any model; one without such layers is returned unchanged.
        batches: training data, each batch the keyword arguments of a forward; 256 examples or more.
        forward: runs one batch. None: ``model(**batch)``.

    Returns:
        The same object.

    Raises:
        TypeError: if the model is not a module, or the batches are not a list of dicts of tensors.
        ValueError: if ``batches`` is empty, or the model cannot run one of them. The statistics are
            then unchanged.

    Example:
        >>> remove_quant_noise(model)
        >>> update_bn_stats(model, islice(train_dataloader, 16))
    """
    require_model(model, nn.Module)
    if forward is None and tracking_norms(model):
        batches = read_batches("batches", batches)
        forward = lambda batch: run_batch(model, batch, "batches")  # noqa: E731
    set_bn_stats(measure_bn_stats(model, batches, forward))
    return model


@torch.no_grad()
def set_bn_stats(statistics: Statistics) -> None:
    """Write statistics into the tensors of their layers, which DDP holds."""
    for norm, (mean, variance, n_batches) in statistics.items():
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        if isinstance(getattr(norm, "num_batches_tracked", None), Tensor):
            norm.num_batches_tracked.fill_(n_batches)


@contextmanager
def bn_stats_of_packed_weights(
    model: nn.Module, measure: Callable[[], Statistics]
) -> Iterator[None]:
    """Change the statistics of BatchNorm as packing inside the context changes those of batches.

    The change depends less on the batches than the statistics do, so that a few examples are
    enough. Inputs of packed layers are not rounded for it: their scales may not be known yet. An
    error leaves the tensors as they were, which are replaced and not written to.

    Args:
        model: the model.
        measure: returns the statistics on the same batches each time; of no layer to change none.
    """

    def measured() -> Statistics:
        with without_rounding([layer for _, layer in packed_layers(model)]):
            return measure()

    before = measured()
    yield
    for norm, (mean, variance, _) in measured().items():
        if norm in before:
            old_mean, old_variance, _ = before[norm]
            ratio = (variance + norm.eps) / (old_variance + norm.eps)
            norm.running_mean = norm.running_mean + (mean - old_mean)
            norm.running_var = norm.running_var * ratio


@torch.no_grad()
def measure_bn_stats(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], object]
) -> Statistics:
    """Return the statistics that :func:`update_bn_stats` sets; the model is left unchanged."""
    norms = tracking_norms(model)
    if not norms:
        return {}
    with raise_on_all_ranks():
        found = _averages(model, norms, batches, forward)
    return {
        norm: averages
        for norm, values in found.items()
        if (averages := _over_ranks(*values))[-1] > 0
    }


def _averages(
    model: nn.Module,
    norms: list[nn.Module],
    batches: Iterable[Any],
    forward: Callable[[Any], object],
) -> Statistics:
    calls: dict[Any, int] = dict.fromkeys(norms, 0)

    def weigh(norm: Any, args: tuple) -> None:
        calls[norm] += 1
        norm.momentum = 1.0 / calls[norm]  # new = (1 - momentum) * old + momentum * batch

    with evaluating(model), ExitStack() as restored:
        for norm in norms:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                if isinstance(tensor := getattr(norm, name, None), Tensor):
                    restored.callback(setattr, norm, name, tensor)
                    setattr(norm, name, torch.zeros_like(tensor))
            restored.callback(setattr, norm, "momentum", norm.momentum)
            restored.enter_context(norm.register_forward_pre_hook(weigh))
            norm.training = True
        n_batches = 0
        for batch in batches:
            forward(batch)
            n_batches += 1
        found: Statistics = {}
        for norm in calls:  # before the tensors are restored
            found[norm] = norm.running_mean, norm.running_var, calls[norm]
    if not n_batches:
        raise ValueError(
            "invalid batches: got none, expected at least one to measure the statistics of "
            "BatchNorm on; pass a few batches of training data"
        )
    return found


def _over_ranks(mean: Tensor, variance: Tensor, n_batches: int) -> tuple[Tensor, Tensor, int]:
    """Return the averages over the batches of all ranks, and their number."""
    if not is_distributed():
        return mean, variance, n_batches
    sums = torch.stack([mean, variance]).float() * n_batches
    total = sum_over_ranks(torch.cat([sums.flatten(), sums.new_tensor([n_batches])]))
    n_batches = int(total[-1])
    mean, variance = total[:-1].view(2, -1).to(mean.dtype) / max(n_batches, 1)
    return mean, variance, n_batches
