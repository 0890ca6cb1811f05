"""Batch normalisation over all processes: on CPUs, where torch has none, and with an activation, too."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn


class CPUSyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of the images of all processes together."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(B, C, height, width)``; the batch may differ in size between processes."""
        return _normalize(self, x) if self.training else super().forward(x)


class CPUSyncBatchNormAct2d(BatchNormAct2d):
    """The same of timm's batch norm with an activation."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(B, C, height, width)``, drop, activate."""
        activated: Tensor = self.act(self.drop(_normalize(self, x))) if self.training else super().forward(x)
        return activated


SYNCHRONIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: CPUSyncBatchNorm2d,
    BatchNormAct2d: CPUSyncBatchNormAct2d,
}


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Let every 2-D batch norm of ``model`` see the images of all processes; for several processes only."""
    if device.type != "cpu":
        # timm's, not torch's: that one would replace a batch norm with an activation by one without
        synchronized: nn.Module = convert_sync_batchnorm(model)
        return synchronized
    for module in model.modules():
        # The same parameters and state, another forward: names of the state dict stay.
        module.__class__ = SYNCHRONIZED.get(type(module), type(module))
    return model


def _normalize(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Training statistics and outputs, computed in float32 at least, whatever autocast made of ``x``."""
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    count = _total(values.new_tensor(float(x.numel() // x.shape[1])))
    mean = _total(values.sum((0, 2, 3))) / count
    centered = values - mean.view(1, -1, 1, 1)
    variance = _total(centered.square().sum((0, 2, 3))) / count
    if norm.track_running_stats:
        _track(norm, mean.detach(), variance.detach(), float(count))
    normalized = centered * (variance + norm.eps).rsqrt().view(1, -1, 1, 1)
    if norm.affine:
        normalized = normalized * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
    return normalized.to(x.dtype)


def _track(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: float) -> None:
    assert norm.num_batches_tracked is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.num_batches_tracked += 1
    momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean), momentum)
    unbiased = variance * (count / max(count - 1, 1))  # as torch has it
    norm.running_var.lerp_(unbiased.to(norm.running_var), momentum)


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
