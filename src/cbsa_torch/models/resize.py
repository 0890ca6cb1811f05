"""Resizing with antialiasing."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from cbsa_torch._core.precision import compute_dtype


def resize(maps: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """``(B, C, h, w)`` to ``(B, C, *size)``, antialiased; ``mode`` is ``"bilinear"`` or ``"bicubic"``."""
    # In channels-last memory torch 2.14 gets a width of 1 wrong. Half precision has no such kernel on the CPU.
    exact = maps.contiguous().to(compute_dtype(maps.dtype))
    return F.interpolate(exact, size, mode=mode, antialias=True).to(maps.dtype)
