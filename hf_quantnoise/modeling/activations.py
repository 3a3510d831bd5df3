"""Fixed-point activations (sections 3.3 and 7.7): inputs of packed layers are rounded to N bits.

Scale and zero point are calibrated with the histogram method in a few forward passes and then
fixed. They are scalars in the checkpoint, ``input_scale`` and ``input_zero_point``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..argument_checks import run_batch
from ..distributed import broadcast_from_rank_0, on_any_rank, sum_over_ranks, widest_over_ranks
from ..layer_types import known_layer_type
from ..module_modes import evaluating
from ..quantizers import FixedPointQuantizer
from ..quantizers.observers import BINS, extremes, histogram, range_of_histogram


def first_input(args: tuple, kwargs: dict) -> Tensor | None:
    """Return the first argument of a layer's forward, or None if it is empty.

    Experts and adapters are called without rows if a batch has none for them. Such a call does not
    count as a run of the layer.
    """
    inputs = args[0] if args else next(iter(kwargs.values()))
    return inputs if inputs.numel() else None


class InputObserver:
    """Statistics of the inputs of one layer: first their extremes, then their histogram."""

    def __init__(self) -> None:
        self.range: tuple[Tensor, Tensor] | None = None  # the extremes, float32 scalars
        self.counts: Tensor | None = None  # number of values in each bin, float32
        self.bins_are_fixed = False  # the extremes are final; inputs are counted now

    def observe(self, layer: nn.Module | None, args: tuple, kwargs: dict) -> None:
        """Add the first argument of one forward; a forward pre-hook."""
        if (inputs := first_input(args, kwargs)) is None:
            return
        values = inputs.detach().float()
        if not self.bins_are_fixed:
            self.range = extremes(values, self.range)
            return
        counts = histogram(values, *self.range) * values.numel()
        self.counts = counts if self.counts is None else self.counts + counts

    def state(self, bits: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return the scale and zero point with the lowest squared error over all inputs.

        They are float32, and the scale is above 0 in ``dtype`` as well.
        """
        low, high = self.range
        if self.counts is not None and bool(high > low):
            low, high = range_of_histogram(self.counts / self.counts.sum(), low, high, bits)
        return FixedPointQuantizer(bits=bits).state_of_range(low, high, dtype)


def require_batches(batches: Sequence, needed_by: str = "activation_bits") -> None:
    """Raise ValueError if no rank has calibration data; all ranks must call it."""
    if not on_any_rank([bool(batches)])[0]:
        raise ValueError(
            f"{needed_by} needs calibration data and got none; use a trainer with a train_dataset, "
            "or quantize_model(..., calibration_data=[batch, ...])"
        )


def rounds_inputs(layer: nn.Module, bits: int | None) -> bool:
    """Return whether the inputs of a layer are rounded; row indices of a table are not."""
    return bits is not None and not known_layer_type(layer).is_table


def name_of(model: nn.Module, layer: nn.Module) -> str:
    """Return the name of a layer in a model; ``"the layer"`` for the model itself."""
    return next(name for name, module in model.named_modules() if module is layer) or "the layer"


def require_reached(
    field: str, model: nn.Module, layers: Iterable[nn.Module], reached: Sequence[bool]
) -> None:
    """Raise ValueError if a layer whose inputs a field needs ran on no rank; all must call it."""
    for layer, is_reached in zip(layers, on_any_rank(reached), strict=True):
        if not is_reached:
            name = name_of(model, layer)
            raise ValueError(
                f"{field}: {name} never ran on the calibration data, so its inputs are unknown; "
                f"exclude it with exclude_modules=[{name!r}]"
            )


@contextmanager
def without_rounding(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let packed layers take their inputs as they are inside the context."""
    bits = [(layer, layer.activation_bits) for layer in layers]
    for layer, _ in bits:
        layer.activation_bits = None
    try:
        yield
    finally:
        for layer, own in bits:
            layer.activation_bits = own


@torch.no_grad()
def require_runs(
    model: nn.Module,
    layers: Sequence[nn.Module],
    batches: Sequence,
    forward: Callable[[object], object],
) -> None:
    """Run batches until each of some layers was called; for most models one batch is enough.

    The batches of all ranks count, and all ranks must call it. Raises ValueError, naming a layer
    that no batch reaches.
    """
    called: set[nn.Module] = set()

    def note_call(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        if first_input(args, kwargs) is not None:
            called.add(layer)

    with evaluating(model), ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(note_call, with_kwargs=True))
        for batch in batches:
            if called.issuperset(layers):
                break
            forward(batch)
    require_reached("activation_bits", model, layers, [layer in called for layer in layers])


@torch.no_grad()
def calibrate(
    model: nn.Module,
    layers: Iterable[nn.Module],
    batches: Sequence,
    forward: Callable[[object], object] | None = None,
) -> None:
    """Set scale and zero point of the inputs of packed layers (section 7.7).

    The batches are run twice in eval mode, for the extremes and for the histogram. The batches of
    all ranks count; all ranks must call it. Packed layers without ``activation_bits`` are skipped.
    ``forward`` runs one batch; None is ``model(**batch)``. Raises ValueError if there is no batch,
    or a layer never ran on them.
    """
    observers = {layer: InputObserver() for layer in layers if layer.activation_bits is not None}
    if not observers:
        return
    require_batches(batches)
    forward = forward or (lambda batch: run_batch(model, batch))
    with evaluating(model), without_rounding(observers), ExitStack() as hooks:
        for layer, observer in observers.items():
            hook = layer.register_forward_pre_hook(observer.observe, with_kwargs=True)
            hooks.enter_context(hook)
        for batch in batches:
            forward(batch)
        _share_ranges(model, observers)
        for batch in batches:
            forward(batch)
    for layer, observer in observers.items():
        sum_over_ranks(observer.counts)
        own_dtype = layer.get_parameter("input_scale").dtype
        for key, value in observer.state(layer.activation_bits, own_dtype).items():
            stored = layer.get_parameter(f"input_{key}")
            if not bool(torch.isfinite(stored.copy_(broadcast_from_rank_0(value)))):
                dtype = str(stored.dtype).removeprefix("torch.")
                raise ValueError(
                    f"activation_bits: the input {key} of {name_of(model, layer)} is {value:g} on "
                    f"the calibration data and {float(stored)} in {dtype}; check the data, load "
                    "the model with dtype=torch.float32, or exclude the layer (exclude_modules)"
                )


def _share_ranges(model: nn.Module, observers: Mapping[nn.Module, InputObserver]) -> None:
    """Give the observers of all ranks the same empty bins, if each layer ran on some rank."""
    have_run = [observer.range is not None for observer in observers.values()]
    require_reached("activation_bits", model, observers, have_run)
    widest = widest_over_ranks([observer.range for observer in observers.values()])
    for (layer, observer), (low, high) in zip(observers.items(), widest, strict=True):
        device = layer.get_parameter("input_scale").device
        observer.range, observer.bins_are_fixed = (low.to(device), high.to(device)), True
        observer.counts = torch.zeros(BINS, device=device)
