"""What models with a class token and a linear head share of timm's model surface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cbsa_torch._core.fingerprint import model_fingerprint
from cbsa_torch._core.precision import is_autocast
from cbsa_torch.nn import TokenMixer
from cbsa_torch.ops.parallel import Ranks


class HeadedTransformer(nn.Module):
    """Base of the Transformers here: a head that can be replaced, and layers that can be recomputed."""

    cls_token: Tensor
    embed_dim: int
    head: nn.Module
    grad_checkpointing: bool
    blocks: nn.ModuleList
    ranks: Ranks | None = None
    """The processes that share the tokens, in context parallel."""
    ranks_agree: bool = False
    """Whether these have found, in a forward pass, that they have the same model."""

    def set_context_parallel(self, ranks: Ranks | None) -> None:
        """Spread the tokens over ranks; :func:`cbsa_torch.parallel.context_parallel` calls this.

        Raises:
            ValueError: a layer needs all tokens at once.
        """
        if ranks is not None:
            block: Any
            for i, block in enumerate(self.blocks):
                _check_shards(f"blocks.{i}.attn", block.attn)
        self.ranks, self.ranks_agree = ranks, False

    def shared_facts(self) -> dict[str, Any]:
        """What must be the same on every rank in a forward pass, whatever the input: once also the weights."""
        autocast = torch.get_autocast_dtype(self.cls_token.device.type) if is_autocast(self.cls_token) else None
        facts = {
            "mode (training)": self.training,
            "mode of gradients": torch.is_grad_enabled(),
            "autocast": autocast,
        }
        return (
            facts if self.ranks_agree else {**facts, "model (weights, options)": model_fingerprint(self)[:16]}
        )

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


def _check_shards(name: str, attn: nn.Module) -> None:
    """Raise unless a layer's mixer, or the one that a module is around, works on tokens that are spread."""
    mixers = {below: module for below, module in attn.named_modules() if isinstance(module, TokenMixer)}
    if not mixers:
        raise ValueError(
            f"{name}: {type(attn).__name__} is no token mixer of cbsa_torch, and may need all tokens at once"
        )
    for below, module in mixers.items():
        try:
            module.check_shards()
        except ValueError as error:
            raise ValueError(f"{name}{below and '.' + below}: {error}") from None


def check_num_classes(num_classes: int) -> None:
    """Raise unless it is a number of outputs."""
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
        raise ValueError(f"num_classes must be an int of at least 0, got {num_classes!r}")
