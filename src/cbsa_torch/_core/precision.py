"""Which precision a computation runs in, whatever the context says."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off for the device of ``tensor``: casting inputs alone does not stop it."""
    if not is_autocast(tensor):  # nothing to switch off; entering a context takes as long as a small operation
        return nullcontext()
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def is_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of ``tensor``."""
    device_type = tensor.device.type  # meta has shapes only, and autocast does not know it
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for low-precision dtypes, else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def solve_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype for factorisations of ``tensor``: float64, or float32 on devices without it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
