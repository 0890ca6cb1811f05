"""The paper's Algorithm 1 as a user would write it down: an independent baseline for time and memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Transcription(nn.Module):
    """CBSA on square grids behind a class token, written from the paper without this library.

    Args:
        dim: channels. num_heads: subspaces. side: of the square grid of representatives.
    """

    def __init__(self, dim: int, num_heads: int, side: int = 8) -> None:
        super().__init__()
        self.num_heads, self.side = num_heads, side
        self.proj = nn.Linear(dim, dim, bias=False)
        self.step_x = nn.Parameter(torch.randn(num_heads, 1, 1))
        self.step_rep = nn.Parameter(torch.randn(num_heads, 1, 1))
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Update ``(B, 1 + side^2, dim)`` tokens."""
        b, n, dim = x.shape
        grid = int((n - 1) ** 0.5)
        w = self.proj(x)
        image = w[:, 1:].transpose(1, 2).reshape(b, dim, grid, grid)
        rep = F.adaptive_avg_pool2d(image, self.side).flatten(2).transpose(1, 2)
        w = w.reshape(b, n, self.num_heads, -1).transpose(1, 2)
        rep = rep.reshape(b, self.side**2, self.num_heads, -1).transpose(1, 2)
        scale = w.shape[-1] ** -0.5
        attention = torch.softmax(rep @ w.transpose(-1, -2) * scale, dim=-1)
        rep = rep + self.step_rep * (attention @ w)
        contracted = torch.softmax(rep @ rep.transpose(-1, -2) * scale, dim=-1) @ rep
        update = self.step_x * (attention.transpose(-1, -2) @ contracted)
        return self.to_out(update.transpose(1, 2).reshape(b, n, dim))


class Floor(nn.Module):
    """The matrix products that a CBSA layer cannot avoid, and nothing else: 4 N d^2 + 4 N M d FLOPs forward.

    Both projections, and the extraction's two products.
    """

    def __init__(self, dim: int, num_heads: int, num_representatives: int = 64) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.proj = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        queries = torch.randn(num_heads, num_representatives, dim // num_heads)
        self.queries = nn.Parameter(queries)

    def forward(self, x: Tensor) -> Tensor:
        """The products; the extraction's result is added in, so that its gradient is needed."""
        b, n, _ = x.shape
        w = self.proj(x)
        heads = w.view(b, n, self.num_heads, -1)
        for i in range(b):
            item = heads[i].transpose(0, 1)  # (H, N, P), in place
            logits = torch.bmm(self.queries, item.transpose(1, 2))
            torch.bmm(logits, item)
        return self.to_out(w)
