"""What kind of differentiation is under way, and whether tensors have values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is active: they see no custom operators."""
    if torch.compiler.is_compiling():
        return False
    transforms: bool = torch._C._are_functorch_transforms_active()
    return transforms or forward_ad._current_level >= 0


def is_per_sample(tensor: Tensor) -> bool:
    """Whether a tensor is one sample of a batch under ``torch.func.vmap``, at any level of transforms."""
    if not is_transformed():
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def has_values(tensor: Tensor) -> bool:
    """Whether there are numbers to look at, of a whole tensor: not while tracing, nor without data."""
    return not (
        torch.compiler.is_compiling() or is_transformed() or type(tensor) is not Tensor or tensor.is_meta
    )
