"""Fixed-point activations (sections 3.3 and 7.7): inputs of packed layers are rounded to N bits.

Scale and zero point are calibrated with the histogram method in a few forward passes and then
fixed. They are scalars in the checkpoint, ``input_scale`` and ``input_zero_point``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..distributed import broadcast_from_rank_0, on_any_rank, sum_over_ranks, widest_over_ranks
from ..layer_types import known_layer_type
from ..quantizers import FixedPointQuantizer
from ..quantizers.observers import BINS, extremes, histogram, range_of_histogram


class InputObserver:
    """Statistics of the inputs of one layer: first their extremes, then their histogram.

    Attributes:
        range: the extremes, float32 scalars; None before the first input.
        counts: number of values in each bin of the histogram, float32.
        bins_are_fixed: whether the extremes are final, so that inputs are counted now.
    """

    def __init__(self) -> None:
        self.range: tuple[Tensor, Tensor] | None = None
        self.counts: Tensor | None = None
        self.bins_are_fixed = False

    def observe(self, inputs: Tensor) -> None:
        """Add the inputs of one forward."""
        values = inputs.detach().float()
        if not self.bins_are_fixed:
            self.range = extremes(values, self.range)
            return
        counts = histogram(values, *self.range) * values.numel()
        self.counts = counts if self.counts is None else self.counts + counts

    def state(self, bits: int) -> dict[str, Tensor]:
        """Return the scale and zero point with the lowest squared error over all inputs."""
        low, high = self.range
        if self.counts is not None and bool(high > low):
            low, high = range_of_histogram(self.counts / self.counts.sum(), low, high, bits)
        return FixedPointQuantizer(bits=bits).state_of_range(low, high)


def require_batches(batches: Sequence, needed_by: str = "activation_bits") -> None:
    """Raise ValueError if no rank has calibration data, naming the field that needs it.

    All ranks must call it.
    """
    if not on_any_rank([bool(batches)])[0]:
        raise ValueError(
            f"{needed_by} needs calibration data and got none; use a trainer with a train_dataset, "
            "or quantize_model(..., calibration_data=[batch, ...])"
        )


def rounds_inputs(layer: nn.Module, bits: int | None) -> bool:
    """Return whether the inputs of a layer are rounded; row indices of a table are not."""
    return bits is not None and not known_layer_type(layer).is_table


def never_ran(field: str, model: nn.Module, layer: nn.Module) -> ValueError:
    """Return the error for a layer whose inputs a field needs and that never ran."""
    name = next(name for name, module in model.named_modules() if module is layer)
    return ValueError(
        f"{field}: {name} never ran on the calibration data, so its inputs are unknown; exclude it "
        f"with exclude_modules=[{name!r}]"
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode inside the context, and restore the mode of each module after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def require_runs(
    model: nn.Module, groups: Sequence[Sequence[nn.Module]], batches: Sequence, field: str
) -> None:
    """Run batches until each group of layers was called; for most models one batch is enough.

    The batches of all ranks count, and all ranks must call it.

    Args:
        model: the model that holds the layers; it runs in eval mode.
        groups: groups of layers, of each at least one must be called.
        batches: keyword arguments of the model's forward, one dict per batch.
        field: the field that needs it, for the error.

    Raises:
        ValueError: naming a layer that no batch reaches.
    """
    called: set[nn.Module] = set()
    hooks = [
        layer.register_forward_pre_hook(lambda layer, _: called.add(layer))
        for group in groups
        for layer in group
    ]
    waiting = list(groups)
    try:
        with evaluating(model):
            for batch in batches:
                if not waiting:
                    break
                model(**batch)
                waiting = [group for group in waiting if called.isdisjoint(group)]
    finally:
        for hook in hooks:
            hook.remove()
    reached = on_any_rank([not called.isdisjoint(group) for group in groups])
    for group, is_reached in zip(groups, reached, strict=True):
        if not is_reached:
            raise never_ran(field, model, group[0])


@torch.no_grad()
def calibrate(
    model: nn.Module,
    layers: Iterable[nn.Module],
    batches: Sequence,
    forward: Callable[[object], object] | None = None,
) -> None:
    """Set scale and zero point of the inputs of packed layers (section 7.7).

    The batches are run twice, for the extremes and for the histogram. In a distributed run each
    rank has its own batches, and the batches of all ranks count; all ranks must call it.

    Args:
        model: the model that holds the layers; it runs in eval mode.
        layers: packed layers; those without ``activation_bits`` are skipped.
        batches: keyword arguments of the model's forward, one dict per batch.
        forward: runs one batch; None is ``model(**batch)``.

    Raises:
        ValueError: if there is no batch, or a layer never ran on them.
    """
    observers = {layer: InputObserver() for layer in layers if layer.activation_bits is not None}
    if not observers:
        return
    require_batches(batches)
    forward = forward or (lambda batch: model(**batch))
    bits = {layer: layer.activation_bits for layer in observers}
    hooks = [
        layer.register_forward_pre_hook(_observe(observer), with_kwargs=True)
        for layer, observer in observers.items()
    ]
    try:
        for layer in observers:
            layer.activation_bits = None  # inputs are measured without rounding
        with evaluating(model):
            for batch in batches:
                forward(batch)
            _share_ranges(model, observers)
            for batch in batches:
                forward(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for layer in observers:
            layer.activation_bits = bits[layer]
    for layer, observer in observers.items():
        sum_over_ranks(observer.counts)
        for key, value in observer.state(layer.activation_bits).items():
            layer.get_parameter(f"input_{key}").copy_(broadcast_from_rank_0(value))


def _observe(observer: InputObserver) -> Callable[[nn.Module, tuple, dict], None]:
    """Return a forward pre-hook that shows the first argument of a layer to an observer."""
    return lambda layer, args, kwargs: observer.observe(
        args[0] if args else next(iter(kwargs.values()))
    )


def _share_ranges(model: nn.Module, observers: Mapping[nn.Module, InputObserver]) -> None:
    """Give the observers of all ranks the same empty bins.

    Raises:
        ValueError: naming a layer that ran on no rank.
    """
    ran = on_any_rank([observer.range is not None for observer in observers.values()])
    for layer, has_run in zip(observers, ran, strict=True):
        if not has_run:
            raise never_ran("activation_bits", model, layer)
    widest = widest_over_ranks([observer.range for observer in observers.values()])
    for (layer, observer), (low, high) in zip(observers.items(), widest, strict=True):
        device = layer.get_parameter("input_scale").device
        observer.range, observer.bins_are_fixed = (low.to(device), high.to(device)), True
        observer.counts = torch.zeros(BINS, device=device)
