"""Batch normalisation over all processes, for CPUs: torch's own SyncBatchNorm is for GPUs only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class CPUSyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of the images of all processes together."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(B, C, height, width)``; the batch may differ in size between processes."""
        if not self.training:
            return super().forward(x)
        size = torch.tensor(float(x.numel() // x.shape[1]), dtype=x.dtype, device=x.device)
        count = _total(size)
        mean = _total(x.sum((0, 2, 3))) / count
        centered = x - mean.view(1, -1, 1, 1)
        variance = _total(centered.square().sum((0, 2, 3))) / count
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach(), float(count))
        normalized = centered * (variance + self.eps).rsqrt().view(1, -1, 1, 1)
        if not self.affine:
            return normalized
        return normalized * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)

    def _track(self, mean: Tensor, variance: Tensor, count: float) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * (count / max(count - 1, 1)), momentum)  # without bias, as torch does


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Let every BatchNorm of ``model`` see the images of all processes; for several processes only."""
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        # The same parameters and state, another forward: names of the state dict stay.
        if type(module) is nn.BatchNorm2d:
            module.__class__ = CPUSyncBatchNorm2d
    return model


class _Total(torch.autograd.Function):
    """The sum over processes. Each process' loss depends on it, so its gradient is their sum, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        torch.distributed.all_reduce(total)
        return total


def _total(x: Tensor) -> Tensor:
    total: Tensor = _Total.apply(x)
    return total
