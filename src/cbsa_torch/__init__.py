"""cbsa_torch: interpretable, linear-time attention for PyTorch.

The functions (``ops``) and layers (``nn``) need torch alone. ``models``, ``streaming``, ``interpret``,
``train`` and ``adapt_vit`` are imported when they are first used; if a package that they need is missing, an
ImportError names the extra to install.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cbsa_torch import nn, ops
from cbsa_torch._version import __version__
from cbsa_torch.nn import CBSA, ISTA, MHSA, MSSA, TSSA, AgentAttention, CBSABlock, LinearCBSA

_LAZY = ("interpret", "models", "streaming", "train")
_FROM_MODELS = ("adapt_vit",)


if TYPE_CHECKING:  # a checker of types knows these, and no others: it does not see __getattr__
    from cbsa_torch import interpret as interpret
    from cbsa_torch import models as models
    from cbsa_torch import streaming as streaming
    from cbsa_torch import train as train
    from cbsa_torch.models import adapt_vit as adapt_vit
else:

    def __getattr__(name: str) -> Any:
        if name in _FROM_MODELS:
            return getattr(importlib.import_module("cbsa_torch.models"), name)
        if name in _LAZY:
            return importlib.import_module(f"cbsa_torch.{name}")
        raise AttributeError(f"module 'cbsa_torch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_FROM_MODELS])


__all__ = [
    "CBSA",
    "ISTA",
    "MHSA",
    "MSSA",
    "TSSA",
    "AgentAttention",
    "CBSABlock",
    "LinearCBSA",
    "__version__",
    "nn",
    "ops",
]
