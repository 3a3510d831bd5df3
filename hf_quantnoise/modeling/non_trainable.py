"""Parameters of a packed layer that no gradient reaches: codes, and scales that are not trained."""

from __future__ import annotations

from torch import Tensor, nn


class NonTrainableParameter(nn.Parameter):
    """A parameter that is never trained: ``requires_grad_`` leaves it as it is.

    Programs switch on the gradients of a model or a part of it tensor by tensor (PEFT those of
    ``modules_to_save``); codes are whole numbers, of which torch would refuse it.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> NonTrainableParameter:
        return super().__new__(cls, data, False)

    def requires_grad_(self, requires_grad: bool = True) -> NonTrainableParameter:
        """Nothing is changed."""
        return self

    def __reduce_ex__(self, protocol):
        # nn.Parameter would come back as one of its own class.
        return NonTrainableParameter, (self.data,)
