"""cbsa_torch: interpretable, linear-time attention for PyTorch.

The functions (``ops``) and layers (``nn``) need torch alone. ``models``, ``streaming``, ``interpret``,
``train`` and ``adapt_vit`` are imported when they are first used; if a package that they need is missing, an
ImportError names the extra to install.
"""

from __future__ import annotations

import importlib
from typing import Any

from cbsa_torch import nn, ops
from cbsa_torch._version import __version__
from cbsa_torch.nn import CBSA, ISTA, MHSA, MSSA, TSSA, AgentAttention, CBSABlock, LinearCBSA

_LAZY = ("interpret", "models", "streaming", "train")
_FROM_MODELS = ("adapt_vit",)


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
