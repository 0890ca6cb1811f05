"""Batch norm whose training statistics are those of several processes together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cbsa_torch.ops.parallel import total


def normalize_together(
    norm: Any, x: Tensor, group: dist.ProcessGroup | None = None, rows: slice = slice(None)
) -> Tensor:
    """Training statistics and outputs, computed in float32 at least, whatever autocast made of ``x``.

    Args:
        norm: a 2-D batch norm, whose running statistics are updated.
        x: ``(B, C, height, width)``; batch and sides may differ between processes, and be 0.
        group: the processes; None: all.
        rows: those of ``x`` that count in the statistics: others hold them, too.
    """
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    own = values[:, :, rows]
    count = total(values.new_tensor(float(own.numel() // x.shape[1])), group)
    mean = total(own.sum((0, 2, 3)), group) / count
    centered = values - mean.view(1, -1, 1, 1)
    variance = total(centered[:, :, rows].square().sum((0, 2, 3)), group) / count
    if norm.track_running_stats:
        norm.num_batches_tracked += 1
        momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean.detach().to(norm.running_mean), momentum)
        unbiased = variance.detach() * (count / (count - 1).clamp(min=1))  # as torch has it
        norm.running_var.lerp_(unbiased.to(norm.running_var), momentum)
    normalized = centered * (variance + norm.eps).rsqrt().view(1, -1, 1, 1)
    if norm.affine:
        normalized = normalized * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
    return normalized.to(x.dtype)
