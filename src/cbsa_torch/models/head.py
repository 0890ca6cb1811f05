"""What models with a class token and a linear head share of timm's model surface."""

from __future__ import annotations

from torch import Tensor, nn


class HeadedTransformer(nn.Module):
    """Base of the Transformers here: a head that can be replaced, and layers that can be recomputed."""

    cls_token: Tensor
    embed_dim: int
    head: nn.Module
    grad_checkpointing: bool

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def make_head(self, num_classes: int) -> nn.Module:
        """A new head (0 classes: none) on the device, in the dtype of the class token and in the mode."""
        if num_classes == 0:
            return nn.Identity()
        like = self.cls_token
        head = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
        return head.train(self.training)


def check_num_classes(num_classes: int) -> None:
    """Raise unless it is a number of outputs."""
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
        raise ValueError(f"num_classes must be an int of at least 0, got {num_classes!r}")
