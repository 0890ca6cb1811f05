"""By what a model is known again: its weights, the classes of its modules and their options."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


@torch.compiler.disable
def model_fingerprint(model: nn.Module) -> str:
    """Of parameters, buffers, classes of modules and their options; of sharded parameters only the shapes."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        options = {
            key: value
            for key, value in sorted(vars(module).items())
            if not key.startswith("_") and isinstance(value, (bool, int, float, str, tuple, type(None)))
        }
        digest.update(repr((name, type(module).__qualname__, options)).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        if not tensor.is_meta and type(tensor).__name__ != "DTensor":
            # a copy: FSDP cannot free memory that NumPy has seen
            numbers = tensor.detach().to("cpu", copy=True).contiguous().reshape(-1).view(torch.uint8)
            digest.update(numbers.numpy().data)
    return digest.hexdigest()
