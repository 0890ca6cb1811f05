"""A packed batch of sequences of many lengths against padding, and against as many tokens of one length.

    python benchmarks/packed.py --threads 2     # minutes; prints a table, writes benchmarks/results/packed.json

Lengths are log-uniform. Three batches go through the same white-box layers in turn: one row of all sequences
(``cu_seqlens``), a batch padded to the longest (``token_mask``, with coordinates in place of the grids, which
differ), and a dense batch of equal lengths with as many tokens, which is what could at best be expected.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from cbsa_torch import CBSA, MSSA, TSSA, AgentAttention, LinearCBSA
from cbsa_torch._core.files import write_atomically
from cbsa_torch.bench import measure
from cbsa_torch.nn import Coordinates, Packing, WhiteBoxBlock
from cbsa_torch.train.engine.console import number_table, print_table, say
from cbsa_torch.train.run.folder import environment

MIXERS: dict[str, Any] = {
    "cbsa": CBSA,
    "linear_cbsa": LinearCBSA,
    "agent": AgentAttention,
    "tssa": TSSA,
    "mssa": MSSA,
}
KINDS = ("packed", "padded", "equal")


@dataclass
class Options:
    """Time packed batches."""

    mixers: tuple[str, ...] = ("cbsa", "mssa")
    """Of "cbsa", "linear_cbsa", "agent", "tssa" and "mssa"."""
    sequences: int = 64
    shortest: int = 64
    """Tokens without the class token."""
    longest: int = 1024
    dim: int = 384
    num_heads: int = 6
    depth: int = 2
    """Layers."""
    repetitions: int = 7
    budget: float = 60.0
    """Seconds for the calls of one kind."""
    device: str = "cpu"
    threads: int = 2
    """CPU threads."""
    seed: int = 0
    output: Path = Path("benchmarks/results/packed.json")


def grids(options: Options) -> list[tuple[int, int]]:
    """Grids of log-uniform areas, from the shortest to the longest, and aspects from 2 : 3 to 3 : 2."""
    generator = torch.Generator().manual_seed(options.seed)
    areas = torch.linspace(0, 1, options.sequences)[torch.randperm(options.sequences, generator=generator)]
    aspects = torch.rand(options.sequences, generator=generator) * 2 - 1
    found = []
    for share, aspect in zip(areas.tolist(), aspects.tolist(), strict=True):
        area = options.shortest * (options.longest / options.shortest) ** share
        height = max(round(math.sqrt(area * 1.5**aspect)), 1)
        found.append((height, max(round(area / height), 1)))
    return found


def run(layers: nn.ModuleList, x: Tensor, place: dict[str, Any]) -> Tensor:
    """All layers. What they share is made anew, as in every forward pass of a model."""
    made = dict(place)
    if "coords" in made:
        made["coords"] = Coordinates(made["coords"])
    if "cu_seqlens" in made:
        made["cu_seqlens"] = Packing(made["cu_seqlens"], grid_sizes=made.pop("grid_sizes"), num_prefix_tokens=1)
    for layer in layers:
        x = layer(x, **made)
    return x


def batches(options: Options) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """The input of each kind, and where its tokens are; a class token before each sequence."""
    sizes = grids(options)
    lengths = torch.tensor([h * w for h, w in sizes])
    count, most, total = len(sizes), int(lengths.max()), int(lengths.sum())
    coords = torch.zeros(count, most, 2, dtype=torch.int64)
    for i, (h, w) in enumerate(sizes):
        coords[i, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
    mask = torch.arange(1 + most) <= lengths[:, None]
    ends = nn.functional.pad((lengths + 1).cumsum(0), (1, 0)).int()
    equal = round(total / count)
    place: dict[str, dict[str, Any]] = {
        "packed": {"cu_seqlens": ends, "grid_sizes": sizes},
        "padded": {"coords": coords, "token_mask": mask},
        "equal": {"grid_size": (equal,)},
    }
    shapes = {"packed": (1, total + count), "padded": (count, 1 + most), "equal": (count, 1 + equal)}
    torch.manual_seed(options.seed)
    inputs = {kind: torch.randn(*shape, options.dim, device=options.device) for kind, shape in shapes.items()}
    on_device = {
        kind: {k: v.to(options.device) if isinstance(v, Tensor) else v for k, v in told.items()}
        for kind, told in place.items()
    }
    return {kind: (inputs[kind], on_device[kind]) for kind in KINDS}


def step(layers: nn.ModuleList, x: Tensor, place: dict[str, Any]) -> None:
    """Forward and backward from nothing."""
    layers.zero_grad(set_to_none=True)
    run(layers, x, place).square().mean().backward()


@torch.no_grad()
def forward(layers: nn.ModuleList, x: Tensor, place: dict[str, Any]) -> None:
    """Inference."""
    run(layers, x, place)


def measure_mixer(options: Options, name: str) -> list[dict[str, Any]]:
    """Seconds of every kind of batch, forward and in a training step."""
    torch.manual_seed(options.seed)
    layers = nn.ModuleList(
        WhiteBoxBlock(options.dim, MIXERS[name](options.dim, options.num_heads, num_prefix_tokens=1))
        for _ in range(options.depth)
    ).to(options.device)
    given, rows = batches(options), []
    for work in (forward, step):
        functions = {kind: partial(work, layers, *given[kind]) for kind in KINDS}
        times = measure.interleaved(
            functions, options.device, repetitions=options.repetitions, budget=options.budget
        )
        seconds = measure.medians(times)
        rows.append({
            "mixer": name,
            "work": work.__name__,
            "seconds": seconds,
            "quartiles": {kind: measure.quartiles(found) for kind, found in times.items()},
            "faster_than_padded": seconds["padded"] / seconds["packed"],
            "over_equal": seconds["packed"] / seconds["equal"],
        })  # fmt: skip
    return rows


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(options.threads)
    lengths = [h * w for h, w in grids(options)]
    padding = len(lengths) * max(lengths) / sum(lengths)
    rows = [row for name in options.mixers for row in measure_mixer(options, name)]
    table = number_table(
        "mixer, work", *(f"{kind} s" for kind in KINDS), "padded / packed", "packed / equal", left=1
    )
    for row in rows:
        cells = [f"{row['seconds'][kind]:.3f}" for kind in KINDS]
        cells += [f"{row['faster_than_padded']:.2f}", f"{row['over_equal']:.2f}"]
        table.add_row(f"{row['mixer']}, {row['work']}", *cells)
    print_table(table)
    say(f"{len(lengths)} sequences, {sum(lengths):,} tokens; padding makes them {padding:.2f} times as many")
    record = {
        "environment": environment(),
        "options": {key: str(value) for key, value in vars(options).items()},
        "tokens": sum(lengths),
        "padding": padding,
        "rows": rows,
    }
    write_atomically(options.output, json.dumps(record, indent=2).encode())
    say(f"results: {options.output}")


if __name__ == "__main__":
    main()
