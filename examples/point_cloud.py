"""Classify clouds of points in space: packed, each of another size, with 3-D coordinates in place of a grid.

    python examples/point_cloud.py

Spheres, cubes and crosses of 60 to 160 noisy points, turned at random. A token is a point, with its Fourier
features; two white-box layers whose CBSA pools over the occupied cells of a 3-D lattice; the mean of the tokens
of a cloud tells its class. Nothing is padded: all clouds of a step are one row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from cbsa_torch import CBSA
from cbsa_torch.nn import Packing, WhiteBoxBlock

SHAPES = ("sphere", "cube", "cross")


@dataclass
class Options:
    """Train a small model on clouds of points."""

    steps: int = 40
    clouds: int = 8
    """In a step."""
    dim: int = 48
    noise: float = 0.03
    seed: int = 0


def cloud(shape: str, generator: torch.Generator, noise: float) -> Tensor:
    """Points ``(n, 3)`` on the surface, turned at random."""
    n = int(torch.randint(60, 161, (), generator=generator))
    x = torch.randn(n, 3, generator=generator)
    if shape == "sphere":
        points = F.normalize(x, dim=-1)
    elif shape == "cube":
        points = x / x.abs().amax(-1, keepdim=True) * 0.8
    else:  # three bars
        axis = F.one_hot(torch.randint(0, 3, (n,), generator=generator), 3)
        points = axis * (2 * torch.rand(n, 1, generator=generator) - 1) * 1.5
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator))
    return points @ turn + noise * torch.randn(n, 3, generator=generator)


def draw(options: Options, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Clouds in one row ``(points, 3)``, where each ends ``(clouds + 1,)``, and their classes."""
    labels = torch.randint(0, len(SHAPES), (options.clouds,), generator=generator)
    clouds = [cloud(SHAPES[label], generator, options.noise) for label in labels.tolist()]
    lengths = torch.tensor([len(points) for points in clouds])
    return torch.cat(clouds), F.pad(lengths.cumsum(0), (1, 0)), labels


class CloudClassifier(nn.Module):
    """Fourier features of points, white-box layers, the mean of each cloud, a linear head."""

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(-1, 3))
        self.embed = nn.Linear(3 * 2 * len(self.frequencies), dim)
        self.layers = nn.ModuleList(
            WhiteBoxBlock(dim, CBSA(dim, 4, num_representatives=32, num_prefix_tokens=0)) for _ in range(2)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, len(SHAPES))

    def forward(self, points: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Logits ``(clouds, classes)``."""
        angles = (points[..., None] * self.frequencies).flatten(1)
        x = self.embed(torch.cat([angles.sin(), angles.cos()], dim=-1))[None]  # (1, points, dim)
        packing = Packing(cu_seqlens, coords=points)  # one for all layers
        for layer in self.layers:
            x = layer(x, cu_seqlens=packing)
        clouds = self.norm(x)[0].split(packing.lengths)
        return self.head(torch.stack([tokens.mean(0) for tokens in clouds]))


def measure(options: Options) -> list[dict[str, float]]:
    """Train; the loss and the accuracy on new clouds now and then."""
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    model = CloudClassifier(options.dim)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = []
    for step in range(options.steps + 1):
        points, ends, labels = draw(options, generator)  # always new ones: nothing is seen twice
        logits = model(points, ends)
        loss = F.cross_entropy(logits, labels)
        right = (logits.argmax(1) == labels).float().mean().item()
        rows.append({"step": step, "points": len(points), "loss": loss.item(), "accuracy": right})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return rows


def main() -> None:
    rows = measure(tyro.cli(Options))
    last = max(len(rows) // 6, 1)
    for start in range(0, len(rows), last):
        part = rows[start : start + last]
        loss, right = (sum(row[key] for row in part) / len(part) for key in ("loss", "accuracy"))
        steps = f"steps {start:3d} to {start + len(part) - 1:3d}"
        print(f"{steps}: loss {loss:.3f}, accuracy on new clouds {right:.2f}")


if __name__ == "__main__":
    main()
