"""A frozen classifier that computes the logits of an example once, for all epochs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput


class RememberedTeacher(nn.Module):
    """Remembers the logits of each example, which do not change as the model is frozen.

    Examples are identified by their token ids. Logits differ from those of another batch by the
    rounding of sums alone, as padding is masked.

    Args:
        model: the classifier, in eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.logits: dict[bytes, Tensor] = {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor):
        """Return the logits of a batch; those of unknown examples are computed."""
        keys = [
            row[mask.bool()].numpy().tobytes()
            for row, mask in zip(input_ids, attention_mask, strict=True)
        ]
        new = torch.tensor([index for index, key in enumerate(keys) if key not in self.logits])
        if len(new):
            batch = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
            logits = self.model(**{name: value[new] for name, value in batch.items()}).logits
            self.logits.update(zip([keys[index] for index in new], logits, strict=True))
        return SequenceClassifierOutput(logits=torch.stack([self.logits[key] for key in keys]))
