"""The paper's synthetic experiment (Fig. 4): linear CBSA presses noisy points onto well-separated lines.

    python examples/compress_lines.py [--iterations 1024] [--output docs/images/lines.png]

Ten classes of points near ten lines through the origin in R^3. Each class is compressed by iterating the
update (6) with the parameter-free linear form (12), Z <- Z - kappa Z (I + Z^T Z / eps^2)^-1, without training:
directions along which a class hardly varies shrink, the one along which it varies a lot stays. The angles of
the points to the true lines, before and after, are written to a JSON file, and a picture beside it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from cbsa_torch import ops

GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))


@dataclass
class Options:
    """Compress noisy lines; the constants are ours, the paper does not state its own."""

    classes: int = 10
    points: int = 100
    """Per class."""
    noise: float = 0.15
    """Standard deviation of the noise, in every direction; along the line it is 1."""
    eps: float = 1.0
    """Epsilon of Eq. 12."""
    kappa: float = 0.02
    """Step of the update (6)."""
    iterations: int = 1024
    seed: int = 0
    output: Path = Path("docs/images/lines.png")


def noisy_lines(options: Options) -> tuple[Tensor, Tensor]:
    """Points ``(1, classes, points, 3)`` and unit directions ``(classes, 3)``, spread over a half-sphere."""
    generator = torch.Generator().manual_seed(options.seed)
    index = torch.arange(options.classes, dtype=torch.float64)
    height = 1 - (index + 0.5) / options.classes
    radius = (1 - height**2).sqrt()
    turn = index * GOLDEN_ANGLE
    directions = torch.stack([radius * turn.cos(), radius * turn.sin(), height], dim=-1)
    shape = (options.classes, options.points)
    along = torch.randn(*shape, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
    return (along * directions[:, None] + options.noise * noise)[None], directions


def compress(points: Tensor, options: Options, keep: list[int]) -> dict[int, Tensor]:
    """Iterate the update (6) with (12), every class a subspace of its own; the states after ``keep`` steps."""
    states = {}
    for iteration in range(options.iterations + 1):
        if iteration in keep:
            states[iteration] = points
        points = points - options.kappa * ops.linear_cbsa(points, eps=options.eps)
    return states


def measure(points: Tensor, directions: Tensor) -> dict[str, float]:
    """Mean angles in degrees between points and lines, and the share of points nearest to their own line."""
    cosine = torch.nn.functional.normalize(points[0], dim=-1) @ directions.mT  # (classes, points, lines)
    angle = cosine.abs().clamp(max=1).acos().rad2deg()
    own = angle.diagonal(dim1=0, dim2=2).mT  # (classes, points)
    others = angle + torch.diag(torch.full((len(directions),), math.inf, dtype=angle.dtype))[:, None]
    nearest_other = others.amin(-1)
    return {
        "angle_to_own_line": own.mean().item(),
        "angle_to_nearest_other_line": nearest_other.mean().item(),
        "separation": (nearest_other - own).mean().item(),
        "nearest_line_is_own": (own < nearest_other).double().mean().item(),
    }


def draw(states: dict[int, Tensor], measures: dict[int, dict[str, float]]) -> Figure:
    """One panel per state, coloured by class."""
    figure = Figure(figsize=(2.25 * len(states), 2.8), layout="constrained")
    for column, (iteration, points) in enumerate(states.items()):
        axis: Any = figure.add_subplot(1, len(states), column + 1, projection="3d")
        for label, of_class in enumerate(points[0]):
            axis.scatter(*of_class.T, s=4, color=f"C{label}", linewidths=0)
        angle = measures[iteration]["angle_to_own_line"]
        axis.set_title(f"{iteration} iterations\n{angle:.1f}° from the true line", fontsize=9)
        axis.set(xlim=(-2, 2), ylim=(-2, 2), zlim=(-2, 2))
        axis.set_box_aspect((1, 1, 1), zoom=1.3)
        axis.set_axis_off()
    return figure


def main() -> None:
    options = tyro.cli(Options)
    keep = sorted({0, *(options.iterations >> shift for shift in (4, 2, 0))})
    points, directions = noisy_lines(options)
    states = compress(points, options, keep)
    measures = {iteration: measure(state, directions) for iteration, state in states.items()}
    for iteration, row in measures.items():
        print(f"{iteration:5d}  " + "  ".join(f"{name} {value:.2f}" for name, value in row.items()))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw(states, measures).savefig(options.output, dpi=120)
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    numbers = {"options": settings, "measures": {str(key): row for key, row in measures.items()}}
    options.output.with_suffix(".json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(f"picture: {options.output}, numbers: {options.output.with_suffix('.json')}")


if __name__ == "__main__":
    main()
