"""Fixed-point activations (sections 3.3 and 7.7): what enters a packed layer is rounded to N bits.

Scale and zero point are found by the histogram method in a few forward passes, then fixed; they are
scalars in the checkpoint, ``input_scale`` and ``input_zero_point``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..distributed import broadcast_from_rank_0, on_any_rank, sum_over_ranks, widest_over_ranks
from ..quantizers import FixedPointQuantizer
from ..quantizers.observers import BINS, extremes, histogram, range_of_histogram


class InputObserver:
    """Watches the inputs of one layer: first their extremes, then their histogram.

    Attributes:
        range: the extremes, float32 scalars; None before the first input.
        counts: how many numbers fell in each bin, float32.
        bins_are_fixed: whether extremes are known, and bins are counted now.
    """

    def __init__(self) -> None:
        self.range: tuple[Tensor, Tensor] | None = None
        self.counts: Tensor | None = None
        self.bins_are_fixed = False

    def observe(self, inputs: Tensor) -> None:
        """Takes the inputs of one forward into account."""
        numbers = inputs.detach().float()
        if not self.bins_are_fixed:
            self.range = extremes(numbers, self.range)
            return
        share = histogram(numbers, *self.range) * numbers.numel()
        self.counts = share if self.counts is None else self.counts + share

    def state(self, bits: int) -> dict[str, Tensor]:
        """Scale and zero point with the lowest squared error over all that was seen."""
        low, high = self.range
        if self.counts is not None and bool(high > low):
            low, high = range_of_histogram(self.counts / self.counts.sum(), low, high, bits)
        return FixedPointQuantizer(bits=bits).state_of_range(low, high)


def require_batches(batches: Sequence, needed_by: str = "activation_bits") -> None:
    """Raises ValueError where there is nothing to calibrate on, on any rank of a distributed run,
    naming the field that needs it. On all ranks."""
    if not on_any_rank([bool(batches)])[0]:
        raise ValueError(
            f"{needed_by} needs calibration data, and there is none: give a trainer with a "
            "train_dataset, or quantize_model(..., calibration_data=[batch, ...])"
        )


def rounds_inputs(layer: nn.Module, bits: int | None) -> bool:
    """Whether what enters a layer is rounded to so many bits; row numbers of a table are not."""
    return bits is not None and not isinstance(layer, nn.Embedding)


def name_in(model: nn.Module, layer: nn.Module) -> str:
    """The name of a layer in its model."""
    return next(name for name, module in model.named_modules() if module is layer)


def never_ran(field: str, model: nn.Module, layer: nn.Module) -> ValueError:
    """What to raise where a layer has no inputs to measure, which a field asks for."""
    name = name_in(model, layer)
    return ValueError(
        f"{field}: {name} never ran on the calibration data, so nothing is known of its inputs; "
        f"leave it out with exclude_modules=[{name!r}]"
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode for a while; each module gets its own mode back."""
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
    """Runs batches until they have reached every group of layers: one is enough for most models.
    In a distributed run the batches of all ranks count; on all ranks.

    Args:
        model: the model that holds the layers; put in eval mode meanwhile.
        groups: layers, of each group one must be called.
        batches: keyword arguments of the model's forward, a dict each.
        field: what needs it; for the error.

    Raises:
        ValueError: naming a layer that none of the batches reaches.
    """
    called: set[nn.Module] = set()
    hooks = [
        layer.register_forward_pre_hook(lambda layer, _: called.add(layer))
        for group in groups
        for layer in group
    ]
    idle = list(groups)
    try:
        with evaluating(model):
            for batch in batches:
                if not idle:
                    break
                model(**batch)
                idle = [group for group in idle if called.isdisjoint(group)]
    finally:
        for hook in hooks:
            hook.remove()
    reached = on_any_rank([not called.isdisjoint(group) for group in groups])
    for group, used in zip(groups, reached, strict=True):
        if not used:
            raise never_ran(field, model, group[0])


@torch.no_grad()
def calibrate(
    model: nn.Module,
    layers: Iterable[nn.Module],
    batches: Sequence,
    forward: Callable[[object], object] | None = None,
) -> None:
    """Sets scale and zero point of the inputs of packed layers (7.7): the batches pass twice, for
    the extremes and for the histogram. In a distributed run each rank has batches of its own, and
    those of all ranks count; on all ranks.

    Args:
        model: the model that holds the layers; put in eval mode meanwhile.
        layers: packed layers with ``activation_bits``; others are passed over.
        batches: keyword arguments of the model's forward, a dict each.
        forward: runs one batch; None takes ``model(**batch)``.

    Raises:
        ValueError: if there is no batch, or a layer never ran on them.
    """
    layers = [layer for layer in layers if layer.activation_bits is not None]
    if not layers:
        return
    require_batches(batches)
    forward = forward or (lambda batch: model(**batch))
    observers = [InputObserver() for _ in layers]
    try:
        for layer, observer in zip(layers, observers, strict=True):
            layer.__dict__["_observer"] = observer
        with evaluating(model):
            _run(batches, forward)
            _share_ranges(model, layers, observers)
            _run(batches, forward)
    finally:
        for layer in layers:
            layer.__dict__.pop("_observer", None)
    for layer, observer in zip(layers, observers, strict=True):
        sum_over_ranks(observer.counts)
        for key, value in observer.state(layer.activation_bits).items():
            layer.get_parameter(f"input_{key}").copy_(broadcast_from_rank_0(value))


def _run(batches: Sequence, forward: Callable[[object], object]) -> None:
    for batch in batches:
        forward(batch)


def _share_ranges(
    model: nn.Module, layers: Sequence[nn.Module], observers: Sequence[InputObserver]
) -> None:
    """Gives the observers of all ranks the same bins, and an empty count of them.

    Raises:
        ValueError: naming a layer that ran on no rank.
    """
    ran = on_any_rank([observer.range is not None for observer in observers])
    for layer, used in zip(layers, ran, strict=True):
        if not used:
            raise never_ran("activation_bits", model, layer)
    ranges = widest_over_ranks([observer.range for observer in observers], torch.device("cpu"))
    for layer, observer, (low, high) in zip(layers, observers, ranges, strict=True):
        device = layer.get_parameter("input_scale").device
        observer.range, observer.bins_are_fixed = (low.to(device), high.to(device)), True
        observer.counts = torch.zeros(BINS, device=device)
