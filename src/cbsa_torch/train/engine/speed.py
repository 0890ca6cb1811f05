"""Settings that make a step faster and change nothing but rounding; measured by benchmarks/profile_step.py."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def to_channels_last(model: M) -> M:
    """Lay the weights of 2-D convolutions out with their channels last, in place; returns the model.

    Convolutions then give their tokens in the order that attention reads them: ``flatten(2).transpose(1, 2)``
    of the stem's output is a view and stays contiguous. To be called before the optimiser, the average (EMA)
    and the wrapper of Accelerate are made. Not under FSDP2, which takes contiguous parameters only.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return model
