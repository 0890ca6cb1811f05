"""What the modules of a model are called: every measure names layers by this, so that names can be matched."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_WRAPPED = "_orig_mod"
"""Where ``torch.compile`` keeps the module that it wraps."""


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` as if nothing were compiled, neither the model nor any part of it.

    What ``torch.compile`` wrapped goes by the name that it had before, and the wrapper is passed over.
    """
    for name, module in model.named_modules():
        if _WRAPPED not in module._modules:
            yield ".".join(part for part in name.split(".") if part != _WRAPPED), module
