"""What the Triton kernels take, known without importing triton, which is optional."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 128
MAX_REPRESENTATIVES = 256


def refusal(keys: Tensor, m: int) -> Exception | None:
    """Why the kernels cannot take ``keys`` ``(B, H, N, P)`` with ``m`` representatives; None if they can."""
    p = keys.shape[-1]
    if keys.dtype not in DTYPES:
        return TypeError(f"impl='triton' takes float32, float16 or bfloat16, got {keys.dtype}")
    if p > MAX_HEAD_DIM:
        return ValueError(f"impl='triton' takes a head dimension of at most {MAX_HEAD_DIM}, got {p}")
    if m > MAX_REPRESENTATIVES:
        return ValueError(f"impl='triton' takes at most {MAX_REPRESENTATIVES} representatives, got {m}")
    return None
