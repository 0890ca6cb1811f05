"""What CBSA is measured against: the paper's steps in plain PyTorch, and a lower bound of the cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NaiveCBSA(nn.Module):
    """The naive baseline: the steps of section 3.2 one after the other, for a class token and a square grid.

    Plain PyTorch without regard to memory layout; no part of the library is used.
    """

    def __init__(self, dim: int, num_heads: int, num_representatives: int = 64) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.to_subspaces = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)
        self.pool = nn.AdaptiveAvgPool2d(int(num_representatives**0.5))
        self.step_rep = nn.Parameter(torch.randn(num_heads, 1, 1))
        self.step_x = nn.Parameter(torch.randn(num_heads, 1, 1))

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        """``(B, 1 + side^2, C)``; the grid that a block hands on is not looked at."""
        b, n, c = x.shape
        side = int((n - 1) ** 0.5)
        w = self.to_subspaces(x)
        rep = self.pool(w[:, 1:].reshape(b, side, side, c).permute(0, 3, 1, 2)).reshape(b, c, -1)
        rep = rep.permute(0, 2, 1).reshape(b, -1, self.num_heads, c // self.num_heads).permute(0, 2, 1, 3)
        w = w.reshape(b, n, self.num_heads, c // self.num_heads).permute(0, 2, 1, 3)
        attn = (torch.matmul(rep, w.transpose(-1, -2)) * self.scale).softmax(dim=-1)  # extract
        rep = rep + self.step_rep * torch.matmul(attn, w)
        rep_attn = (torch.matmul(rep, rep.transpose(-1, -2)) * self.scale).softmax(dim=-1)  # contract
        contracted = torch.matmul(rep_attn, rep)
        out = self.step_x * torch.matmul(attn.transpose(-1, -2), contracted)  # broadcast
        return self.to_out(out.permute(0, 2, 1, 3).reshape(b, n, c))


class LowerBound(nn.Module):
    """Only the products that every implementation computes: both projections and the extraction.

    4 N d^2 + 4 N M d FLOPs, without pooling, softmax, contraction or broadcast. The mean of the extracted
    representatives is added to the output, so that the backward pass computes the gradients of all products.
    """

    def __init__(self, dim: int, num_heads: int, num_representatives: int = 64) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_subspaces = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)
        self.representatives = nn.Parameter(torch.randn(num_heads, num_representatives, dim // num_heads))

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        """``(B, N, C)``; the grid that a block hands on is not looked at."""
        w = self.to_subspaces(x)
        tokens = w.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        extracted = (self.representatives @ tokens.mT) @ tokens  # (B, H, M, P)
        bias = self.to_out.bias + extracted.mean()
        return F.linear(w, self.to_out.weight, bias)
