"""Parameters of a packed layer that are never trained: codes, scales and zero points."""

from __future__ import annotations

from torch import Tensor, nn


class NonTrainableParameter(nn.Parameter):
    """A parameter whose ``requires_grad_`` does nothing.

    Callers enable the gradients of all parameters of a module (PEFT those of ``modules_to_save``);
    for codes, which are integers, torch would raise.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> NonTrainableParameter:
        return super().__new__(cls, data, False)

    def requires_grad_(self, requires_grad: bool = True) -> NonTrainableParameter:
        """Leave the parameter unchanged."""
        return self

    def __reduce_ex__(self, protocol):
        return NonTrainableParameter, (self.data,)  # nn.Parameter would restore its own class
