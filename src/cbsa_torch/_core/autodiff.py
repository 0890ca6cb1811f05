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
    """Whether there are numbers to look at, of a whole tensor: not while tracing, nor without data.

    In ``torch.jit.trace`` there are, but what is decided by them would be kept for the numbers of others.
    """
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return not (
        torch.compiler.is_compiling()
        or tracing
        or is_transformed()
        or type(tensor) is not Tensor
        or tensor.is_meta
    )


def check_values(holds: Tensor, message: str) -> None:
    """Raise ``ValueError`` unless ``holds``, one bool; in compiled and exported programs when they run.

    Raises:
        ValueError: also in ``torch.jit.trace``, whose graphs keep no check.
    """
    if has_values(holds):
        if not holds:
            raise ValueError(message)
    elif torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise ValueError(f"{message}; torch.jit.trace cannot check that for other inputs: use torch.export")
    else:
        torch._assert_async(holds, message)
