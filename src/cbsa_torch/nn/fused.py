"""Layers merged for inference: what ``fuse()`` of a layer returns, timm's convention.

``timm.utils.reparameterize_model(model)`` calls the ``fuse()`` of every layer that has one.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from cbsa_torch._core.linear import call_changes, is_readable


class Fused(nn.Module):
    """Base of layers that stand for several: their parameters are fixed, and only these can be loaded."""

    def train(self, mode: bool = True) -> Fused:
        """Refuse training mode: ``RuntimeError``."""
        if mode:
            raise RuntimeError(
                f"{type(self).__name__} is fused for inference and cannot be trained: what it stands for is "
                "gone; train the model that it was made from"
            )
        return super().train(False)

    def fuse(self) -> Fused:
        """Itself."""
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        own = {prefix + name for name, _ in self.named_parameters()}
        other = sorted(name for name in state_dict if name.startswith(prefix) and name not in own)
        if other:  # also with strict=False, which would load a part of a layer
            errors: list[str] = args[-1]
            errors.append(
                f"{prefix.rstrip('.')} is fused and takes no weights of its parts (got {other[0]}); "
                "load them before fusing"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


class FusedLinear(Fused, nn.Linear):
    """A linear layer whose weight was computed once."""


def check_fusable(*layers: nn.Module) -> None:
    """Raise where a layer that is merged would lose what was done to it.

    Raises:
        ValueError: it has hooks, or its ``forward`` was replaced. TypeError: its weights are quantised or such.
    """
    for layer in layers:
        change = call_changes(layer)
        if change:
            raise ValueError(
                f"{type(layer).__name__} cannot be fused: {change}, which would be lost; remove it"
            )
        for name, parameter in layer.named_parameters():
            if not is_readable(parameter):
                raise TypeError(
                    f"{type(layer).__name__} cannot be fused: {name} must be an ordinary tensor, "
                    f"got {type(parameter).__name__}; fuse before quantising"
                )
