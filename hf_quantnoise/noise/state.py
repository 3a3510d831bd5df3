"""The state of a noisy model: what is noised, how much, and the refresh of codebooks and scales."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..blocks import weight_matrix
from ..configuration import QuantNoiseConfig
from ..distributed import broadcast_from_rank_0, full_tensor
from ..sharing import LayerSharing
from .activations import ActivationNoise, share_ranges
from .functions import NoiseFunction
from .layerdrop import LayerDrop
from .operator import WeightNoise

logger = logging.get_logger(__name__)

_STATE = "_quant_noise"
_UNREACHED = (
    "the model has not called it in training so far: it reads the weight past the layer, where "
    "there is no noise, or does not use it"
)


@dataclass
class NoisedWeight:
    """One weight with noise.

    Attributes:
        names: the layers that hold it; several where they are tied.
        modules: those layers.
        noise: the noise.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    noise: WeightNoise

    def unreached(self) -> list[str]:
        """The layers that the noise has not fallen on. A table that is tied to one that is looked
        up does not count: it may be there for its name alone (T5's ``shared``)."""
        return [
            name
            for member, (name, module) in enumerate(zip(self.names, self.modules, strict=True))
            if not self.noise.reached(member)
            and not (self.noise.used and isinstance(module, nn.Embedding))
        ]


class QuantNoiseState:
    """Everything about the noise of one model. It is no module, parameter or buffer.

    Attributes:
        config: the config the noise was made from.
        weights: the noised weights, in the order of the module tree.
        activations: layer name -> what rounds its input; empty without ``activation_bits``.
        layerdrop: rate at which layers are skipped, or None.
        sharing: which layers share their weights.
        left_clean: layer (or bare parameter) name -> why it has no noise, or lacks one of several.
    """

    def __init__(
        self,
        config: QuantNoiseConfig,
        weights: list[NoisedWeight],
        left_clean: dict[str, str],
        rates: list[float],
        sharing: LayerSharing,
        layerdrop: LayerDrop | None = None,
    ) -> None:
        self.config = config
        self.weights = weights
        self.left_clean = left_clean
        self._rates = rates
        self.sharing = sharing
        self.layerdrop = layerdrop
        self.activations: dict[str, ActivationNoise] = {}
        self._ranges_are_shared = False
        if config.activation_bits is not None:
            self.activations = {
                name: ActivationNoise(config.activation_bits, config.activation_calibration)
                for name, module in self.layers.items()
                if not isinstance(module, nn.Embedding)
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
        """The rate of each noise now, in the order of the config; set one for all, or one each."""
        return tuple(self._rates)

    @p.setter
    def p(self, value: float | Sequence[float]) -> None:
        rates = list(value) if isinstance(value, Sequence) else [value] * len(self._rates)
        if len(rates) != len(self._rates) or not all(0.0 <= rate <= 1.0 for rate in rates):
            raise ValueError(
                f"p={value!r} must be a rate from 0 to 1, or {len(self._rates)} of them for the "
                f"noises {[name for name, _ in self.config.noises]}"
            )
        self._rates[:] = map(float, rates)  # the list is shared with every layer

    def rates(self) -> dict[str, float]:
        """For logs: ``noise_p``, or one for each of several noises."""
        if len(self._rates) == 1:
            return {"noise_p": self._rates[0]}
        return {f"noise_p_{number}": rate for number, rate in enumerate(self._rates)}

    def figures(self, model: nn.Module) -> dict[str, float]:
        """:meth:`rates`, and ``noised_share``: the share of all parameters of a dense model that a
        training forward replaces, on average."""
        noised = 0.0
        for weight in self.weights:
            clean = math.prod(1 - self._rates[number] for number, _ in weight.noise.functions)
            noised += (1 - clean) * weight.noise.rows * weight.noise.columns
        total = sum(parameter.numel() for parameter in model.parameters())
        return {**self.rates(), "noised_share": noised / total}

    def note_unreached(self) -> list[str]:
        """Finds layers that no noise has fallen on, though training forwards have been run: a model
        may read a weight without calling its layer, or a trainer that of a head, tied or not. They
        are named in ``left_clean``, and warned of once.

        Returns:
            Their names; none before the first forward with noise.
        """
        begun = any(weight.noise.used for weight in self.weights)
        found = [
            name
            for weight in self.weights
            if begun and weight.noise.active
            for name in weight.unreached()
        ]
        known = [name for name, reason in self.left_clean.items() if reason == _UNREACHED]
        for name in set(known).difference(found):
            del self.left_clean[name]
        if new := [name for name in found if name not in known]:
            self.left_clean.update(dict.fromkeys(new, _UNREACHED))
            logger.warning("no quantization noise on %s: %s", ", ".join(new), _UNREACHED)
        return found

    def refresh_codebooks(self) -> None:
        """Runs k-means on the present weights, from the present centroids (section 4.2).

        In a distributed run all ranks must call it; they take the codebooks of rank 0.
        """
        self._refresh("codebooks")

    def refresh_scales(self) -> None:
        """Sets scale and zero point of the present weights (Eq. 2), and shares the ranges of
        inputs; on all ranks, as above."""
        self._refresh("scales")
        self.share_ranges()

    def share_ranges(self) -> None:
        """Gives all ranks of a distributed run one range for the inputs of each layer, that of all
        their batches so far; all must call it, after an optimizer step. Until then a rank rounds
        between what it has seen itself."""
        if not self._ranges_are_shared:
            self._ranges_are_shared = share_ranges(list(self.activations.values()))

    def state_dict(self) -> dict[str, Tensor]:
        """All fitted tensors: ``<layer>.<number of the noise>.<tensor>`` -> tensor, and
        ``<layer>.input.<tensor>`` for activations.

        Tied layers stand under the first of them.
        """
        parts = [(prefix, function) for _, prefix, function in self._functions()]
        parts += [(f"{name}.input", noise) for name, noise in self.activations.items()]
        return {
            f"{prefix}.{key}": tensor
            for prefix, part in parts
            for key, tensor in part.state_dict().items()
        }

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what :meth:`state_dict` gave, e.g. from a checkpoint.

        Raises:
            ValueError: if the tensors come from another noise or model; nothing is changed then.
        """
        own = self.state_dict().keys()
        if tensors.keys() != own:
            odd = sorted(tensors.keys() ^ own)
            raise ValueError(
                f"the tensors belong to another noise or model: they have {len(tensors)} names, "
                f"this noise ({self.config.noise!r}) has {len(own)}; not in both: "
                f"{', '.join(odd[:4])}{', ...' if len(odd) > 4 else ''}"
            )
        parts = [
            (prefix, function, {key: tensors[f"{prefix}.{key}"] for key in function.state})
            for _, prefix, function in self._functions()
        ]
        for prefix, function, part in parts:
            try:
                function.check_state(part)
            except ValueError as error:
                raise ValueError(f"{prefix}: {error}") from None
        for _, function, part in parts:
            function.load_state_dict(part)
        for name, noise in self.activations.items():
            own_part = {key: tensors[f"{name}.input.{key}"] for key in noise.state_dict()}
            noise.load_state_dict(own_part)
        self._ranges_are_shared = False

    def _functions(self) -> Iterator[tuple[NoisedWeight, str, NoiseFunction]]:
        for weight in self.weights:
            for number, function in weight.noise.functions:
                yield weight, f"{weight.names[0]}.{number}", function

    @torch.no_grad()
    def _refresh(self, kind: str) -> None:
        for index, (weight, _, function) in enumerate(self._functions()):
            if function.refreshed != kind:
                continue
            module = weight.modules[0]
            matrix = weight_matrix(module, full_tensor(module.weight))
            with torch.autocast(matrix.device.type, enabled=False):
                function.refresh(matrix, self.config.seed + index)
            for key, tensor in function.state.items():
                function.state[key] = broadcast_from_rank_0(tensor)

    def __repr__(self) -> str:
        return (
            f"QuantNoiseState(noise={self.config.noise!r}, p={self.p}, "
            f"{len(self.layers)} layers, {len(self.left_clean)} left clean)"
        )


def attach(model: nn.Module, state: QuantNoiseState) -> None:
    """Makes a state reachable from its model."""
    model.__dict__[_STATE] = state


def detach(model: nn.Module) -> None:
    """Forgets the states of a model and its parts."""
    for module in model.modules():
        module.__dict__.pop(_STATE, None)


def find_state(model: nn.Module) -> QuantNoiseState | None:
    """The noise state of a model, or None. Looks through wrappers (DDP, compiled modules)."""
    return next(
        (module.__dict__[_STATE] for module in model.modules() if _STATE in module.__dict__), None
    )
