"""The teacher's term: the compressed model follows the logits of the uncompressed one (3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, labels: Tensor | None = None
) -> Tensor:
    """Divergence of the student's predictions from the teacher's.

    KL(softmax(teacher / T) || softmax(student / T)) * T^2, the mean over examples (over tokens,
    where logits have a sequence dimension; those labelled -100 are left out). With a single logit
    (regression) the mean squared error.

    Args:
        student, teacher: logits, shape (..., classes).
        temperature: T.
        labels: labels of shape (...), for the tokens to leave out.

    Raises:
        ValueError: if the logits have different shapes.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the teacher's logits are {tuple(teacher.shape)} and the student's "
            f"{tuple(student.shape)}; the teacher needs the student's head and labels"
        )
    student, teacher = student.float(), teacher.float()
    if student.shape[-1] == 1:
        return F.mse_loss(student, teacher)
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.log_softmax(teacher / temperature, dim=-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    if labels is not None and student.dim() > 2 and labels.shape == divergence.shape:
        divergence = divergence[labels != -100]
    return torch.mean(divergence) * temperature**2
