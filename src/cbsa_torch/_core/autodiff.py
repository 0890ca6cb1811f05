"""What kind of differentiation is under way."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is active: they see no custom operators."""
    if torch.compiler.is_compiling():
        return False
    transforms: bool = torch._C._are_functorch_transforms_active()
    return transforms or forward_ad._current_level >= 0
