"""State of a noisy model: rates, noised weights, and the refresh of codebooks and scales."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..blocks import weight_matrix
from ..configuration import QuantNoiseConfig
from ..distributed import (
    broadcast_from_rank_0,
    full_tensor,
    is_distributed,
    max_over_ranks,
    widest_over_ranks,
)
from ..lookups import Lookups
from ..quantizers.base import require_finite
from ..sharing import LayerSharing
from .activations import ActivationNoise
from .functions import NoiseFunction
from .layerdrop import LayerDrop
from .operator import WeightNoise

logger = logging.get_logger(__name__)

_STATE = "_quant_noise"
_UNREACHED = (
    "the layer's forward was never called during training (its weight is read directly, or it is "
    "unused), so it gets no noise"
)


@dataclass
class NoisedWeight:
    """One weight with noise, and the layers that hold it; several if they are tied."""

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    noise: WeightNoise

    def unreached(self) -> list[str]:
        """Return the layers that never received noise."""
        # An embedding tied to one that is used may exist for its name only (T5's ``shared``).
        return [
            name
            for member, (name, module) in enumerate(zip(self.names, self.modules, strict=True))
            if not self.noise.reached(member)
            and not (self.noise.used and isinstance(module, nn.Embedding))
        ]


@dataclass(eq=False, repr=False)
class QuantNoiseState:
    """Everything about the noise of one model. It is not a module, parameter or buffer.

    Attributes:
        config: the config the noise was made from.
        weights: the noised weights, in the order of the module tree.
        left_clean: layer (or bare parameter) name -> why it has no noise, or lacks one of several.
        sharing: which layers share their weights.
        layerdrop: settings of LayerDrop, or None.
        lookups: layer -> number of lookups of each row, from which tables have groups of rows.
        activations: layer name -> noise on its input; empty without ``activation_bits``.
    """

    config: QuantNoiseConfig
    weights: list[NoisedWeight]
    left_clean: dict[str, str]
    sharing: LayerSharing
    layerdrop: LayerDrop | None = None
    lookups: Lookups = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.p = [rate for _, rate in self.config.noises]
        self._ranges_are_shared = False
        bits, calibration = self.config.activation_bits, self.config.activation_calibration
        self.activations = {
            name: ActivationNoise(bits, calibration)
            for name, module in self.layers.items()
            if bits is not None and not isinstance(module, nn.Embedding)
        }

    @property
    def layers(self) -> dict[str, nn.Module]:
        """Layer name -> layer, for every layer with noise."""
        return {
            name: module
            for weight in self.weights
            for name, module in zip(weight.names, weight.modules, strict=True)
        }

    @property
    def p(self) -> tuple[float, ...]:
        """Current rate of each noise; set one rate for all noises, or one each."""
        return self._p

    @p.setter
    def p(self, value: float | Sequence[float]) -> None:
        n_noises = len(self.config.noises)
        rates = list(value) if isinstance(value, Sequence) else [value] * n_noises
        if len(rates) != n_noises or not all(0.0 <= rate <= 1.0 for rate in rates):
            raise ValueError(
                f"invalid p: got {value!r}, expected a rate from 0 to 1, or one for each of the "
                f"{n_noises} noises {[name for name, _ in self.config.noises]}"
            )
        self._p = tuple(map(float, rates))
        for weight in self.weights:
            weight.noise.rates = list(self._p)

    @property
    def used(self) -> bool:
        """Whether any forward in training has applied the noise."""
        return any(weight.noise.used for weight in self.weights)

    def rates(self) -> dict[str, float]:
        """Return the rates for logs: ``noise_p``, or ``noise_p_<index>`` for several noises."""
        if len(self.p) == 1:
            return {"noise_p": self.p[0]}
        return {f"noise_p_{index}": rate for index, rate in enumerate(self.p)}

    def figures(self, model: nn.Module) -> dict[str, float]:
        """Return :meth:`rates`, and the share of parameters a forward replaces on average."""
        noised = 0.0
        for weight in self.weights:
            kept = math.prod(1 - self.p[index] for index, _ in weight.noise.functions)
            noised += (1 - kept) * weight.noise.rows * weight.noise.columns
        total = sum(parameter.numel() for parameter in model.parameters())
        return {**self.rates(), "noised_share": noised / total}

    def note_unreached(self) -> list[str]:
        """Return the layers without noise although training forwards have run; warn once.

        A model may read a weight without calling its layer, or never use the layer. Such layers are
        listed in ``left_clean``. There are none before the first forward with noise.
        """
        active = [weight for weight in self.weights if self.used and weight.noise.active]
        found = [name for weight in active for name in weight.unreached()]
        known = [name for name, reason in self.left_clean.items() if reason == _UNREACHED]
        for name in set(known).difference(found):
            del self.left_clean[name]
        if new := [name for name in found if name not in known]:
            self.left_clean.update(dict.fromkeys(new, _UNREACHED))
            logger.warning("no quantization noise on %s: %s", ", ".join(new), _UNREACHED)
        return found

    def refresh_codebooks(self) -> None:
        """Run a few steps of k-means on the current weights, from the last codes (section 4.2).

        Must be called on all ranks of a distributed run, which get the codebooks of rank 0.

        Raises:
            RuntimeError: if a weight was resized.
        """
        self._refresh("codebooks")

    def refresh_scales(self) -> None:
        """Fit scale and zero point to the current weights (Eq. 2), and share input ranges.

        Must be called on all ranks of a distributed run, which get the scales of rank 0.

        Raises:
            RuntimeError: if a weight was resized.
        """
        self._refresh("scales")
        self.share_ranges()

    def share_ranges(self) -> None:
        """Give all ranks one range for each layer's input: that of all their batches so far.

        Must be called on all ranks of a distributed run, after an optimizer step; before it, each
        rank uses the range of its batches.
        """
        if self._ranges_are_shared:
            return
        noises = list(self.activations.values())
        if is_distributed() and noises:
            ranges = widest_over_ranks([noise.range for noise in noises])
            seen = max_over_ranks(torch.tensor([noise.seen for noise in noises], device="cpu"))
            for noise, widest, count in zip(noises, ranges, seen.tolist(), strict=True):
                noise.seen, noise.range = count, widest if count else None
        self._ranges_are_shared = all(noise.seen >= noise.calibration for noise in noises)

    def parameters(self) -> list[nn.Parameter]:
        """Return the centroids that are trained; empty without ``learn_codebooks``."""
        return [
            tensor
            for _, noise in self._stateful_noises()
            for tensor in noise.state.values()
            if isinstance(tensor, nn.Parameter)
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Return all fitted tensors.

        Keys are ``<layer>.<index of the noise>.<tensor>``, and ``<layer>.input.<tensor>`` for
        activations. Tied layers are stored under the first of them.
        """
        return {
            f"{prefix}.{key}": tensor.detach()
            for prefix, noise in self._stateful_noises()
            for key, tensor in noise.state.items()
        }

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Load the tensors of :meth:`state_dict`, e.g. from a checkpoint.

        Raises:
            ValueError: if the tensors belong to another noise or model; nothing is loaded then.
        """
        current = self.state_dict()
        if differing := sorted(tensors.keys() ^ current.keys()):
            raise ValueError(
                f"the tensors belong to another noise or model: got {len(tensors)}, expected the "
                f"{len(current)} of noise={self.config.noise!r}; not in both: "
                f"{', '.join(differing[:4])}{', ...' if len(differing) > 4 else ''}"
            )
        for name, tensor in current.items():
            if tensors[name].shape != tensor.shape:
                raise ValueError(
                    f"invalid shape of {name}: got {tuple(tensors[name].shape)}, expected "
                    f"{tuple(tensor.shape)}; the tensors belong to another noise or model"
                )
        for prefix, noise in self._stateful_noises():
            loaded = {key: tensors[f"{prefix}.{key}"] for key in noise.state}
            noise.state = {key: _loaded(noise.state[key], loaded[key]) for key in loaded}
        self._ranges_are_shared = False

    def _stateful_noises(self) -> Iterator[tuple[str, NoiseFunction | ActivationNoise]]:
        """Yield the prefix of each noise in a state dict, and the noise."""
        for weight in self.weights:
            for index, function in weight.noise.functions:
                yield f"{weight.names[0]}.{index}", function
        for name, noise in self.activations.items():
            yield f"{name}.input", noise

    @torch.no_grad()
    def _refresh(self, kind: str) -> None:
        functions = [(weight, f) for weight in self.weights for _, f in weight.noise.functions]
        for position, (weight, function) in enumerate(functions):
            if function.refreshed != kind:
                continue
            module: Any = weight.modules[0]
            matrix = weight_matrix(module, full_tensor(module.weight))
            weight.noise.require_shape(matrix.shape)
            require_finite(matrix, f"{weight.names[0]}.weight")
            with torch.autocast(matrix.device.type, enabled=False):
                function.refresh(matrix, self.config.seed + position)
            for key, tensor in function.state.items():
                function.state[key] = _loaded(tensor, broadcast_from_rank_0(tensor.detach()))

    def __repr__(self) -> str:
        return (
            f"QuantNoiseState(noise={self.config.noise!r}, p={self.p}, "
            f"{len(self.layers)} layers, {len(self.left_clean)} skipped)"
        )


def _loaded(tensor: Tensor, values: Tensor) -> Tensor:
    """Return a tensor with new values; the same one, if an optimizer may hold it."""
    if not isinstance(tensor, nn.Parameter):
        return values.detach().to(tensor, copy=True)
    tensor.data.copy_(values)
    return tensor


def attach(model: nn.Module, state: QuantNoiseState) -> None:
    """Store a state on its model, for :func:`find_state`."""
    model.__dict__[_STATE] = state


def detach(model: nn.Module) -> None:
    """Remove the states of a model and its submodules."""
    for module in model.modules():
        module.__dict__.pop(_STATE, None)


def find_state(model: nn.Module) -> QuantNoiseState | None:
    """Return the noise state of a model, or None. Wrappers (DDP, compiled modules) are searched."""
    return next(find_states(model), None)


def find_states(model: nn.Module) -> Iterator[QuantNoiseState]:
    """Yield the noise states of a model and its submodules."""
    return (m.__dict__[_STATE] for m in model.modules() if _STATE in m.__dict__)
