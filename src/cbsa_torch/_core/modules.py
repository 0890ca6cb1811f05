"""What the modules inside a model say about their parameters."""

from __future__ import annotations

from torch import nn


def no_weight_decay_inside(model: nn.Module) -> set[str]:
    """Names, relative to ``model``, of the parameters that its submodules list in ``no_weight_decay()``."""
    names: set[str] = set()
    for prefix, module in model.named_modules():
        listed = getattr(module, "no_weight_decay", None)
        if prefix and listed is not None:
            names |= {f"{prefix}.{name}" for name in listed()}
    return names
