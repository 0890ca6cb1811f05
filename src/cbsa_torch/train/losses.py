"""What training minimises: the cross-entropy, and the type of any other loss."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from cbsa_torch.train.data import IGNORE

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""A scalar of (model, images, targets): a mean over the targets that are not ``IGNORE``."""


def mean_loss(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over the targets that are known.

    Args:
        logits: ``(B, classes)`` of images, or ``(B, classes, height, width)`` of pixels.
        targets: ``(B)`` or ``(B, height, width)``, a class or ``IGNORE`` each.
        label_smoothing: share of a target that is spread over all classes.
    """
    total = F.cross_entropy(
        logits, targets, label_smoothing=label_smoothing, ignore_index=IGNORE, reduction="sum"
    )
    return total / (targets != IGNORE).sum().clamp(min=1)


def cross_entropy(label_smoothing: float) -> Loss:
    """:func:`mean_loss` of a model's outputs."""

    def loss(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return mean_loss(model(images).float(), targets, label_smoothing)

    return loss
