"""Whole slides of up to 200,000 tiles: time and memory of a token-set model beside others that compare tiles.

    python benchmarks/slides.py [--threads 2] [--output benchmarks/results/slides.json]

Tiles are random features (1,536 numbers each) on a lattice that is mostly empty, as tissue is. Measured are the
forward pass without gradients of the CBSA model, of layers of Nyström attention, and, at sizes where it is
still possible, of the CBSA model with fused softmax attention (MSSA) in its layers; and a training step of the
CBSA model that keeps only the inputs of its layers (``recompute``). Times that are compared are interleaved:
those of models at one size, and those of the CBSA model at all sizes. Memory is the most that is allocated at a
time beyond what was there before, so without the features; the profiler that counts it slows down what it
counts, which is not timed.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cbsa_torch.bench.baselines import NystromAggregator
from cbsa_torch.bench.measure import interleaved, medians, memory
from cbsa_torch.models import TokenSetTransformer
from cbsa_torch.nn import Coordinates
from cbsa_torch.ops import pool_by_coordinates
from cbsa_torch.train.run.folder import environment

SUMMARIES = 64
"""Representatives, or landmarks."""
GIB = 2**30


@dataclass
class Options:
    """Measure models of slides."""

    tiles: tuple[int, ...] = (20_000, 50_000, 200_000)
    softmax_tiles: int = 50_000
    """The most tiles that softmax attention is given."""
    in_dim: int = 1536
    dim: int = 384
    depth: int = 4
    num_heads: int = 6
    repetitions: int = 3
    budget: float = 60.0
    """Seconds for the calls of one model at one size."""
    threads: int = 2
    """CPU threads."""
    device: str = "cpu"
    output: Path = Path("benchmarks/results/slides.json")


def draw(tiles: int, options: Options) -> tuple[Tensor, Tensor]:
    """Features ``(1, N, in_dim)`` and coordinates of a lattice, a fifth of it occupied, in pieces."""
    generator = torch.Generator().manual_seed(0)
    side = int((5 * tiles) ** 0.5) + 1
    pieces = torch.rand(8, 2, generator=generator) * side
    places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).view(-1, 2)
    nearest = torch.full((len(places),), torch.inf)
    for piece in pieces:
        nearest = torch.minimum(nearest, (places - piece).square().sum(-1))
    coords = 512 * places[nearest.argsort()[:tiles].sort().values]
    features = torch.randn(1, tiles, options.in_dim, generator=generator)
    return features.to(options.device), coords[None].to(options.device)


def models(options: Options) -> dict[str, nn.Module]:
    """What is compared, by name."""
    sizes = options.in_dim, 2, options.dim, options.depth, options.num_heads
    made: dict[str, nn.Module] = {
        "cbsa": TokenSetTransformer(*sizes, num_representatives=SUMMARIES),
        "nystrom": NystromAggregator(*sizes, num_landmarks=SUMMARIES),
        "softmax": TokenSetTransformer(*sizes, mixer="mssa"),
    }
    return {name: model.to(options.device).eval() for name, model in made.items()}


def forward(model: nn.Module, features: Tensor, coords: Tensor) -> Tensor:
    """Inference."""
    with torch.no_grad():
        logits: Tensor = model(features, coords)
    return logits


def training_step(options: Options, features: Tensor, coords: Tensor) -> Callable[[], None]:
    """A forward and backward pass that keeps the inputs of layers."""
    sizes = options.in_dim, 2, options.dim, options.depth, options.num_heads
    model = TokenSetTransformer(*sizes, num_representatives=SUMMARIES, recompute=True).to(options.device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(features, coords).square().mean().backward()

    return step


def timed(function: Callable[[], Any], repetitions: int) -> float:
    """The least time of some calls; what disturbs a short call only adds to it."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def parts(options: Options, coords: Tensor) -> dict[str, float]:
    """Seconds of finding the cells, once per forward pass, and of pooling over them, once per layer."""
    tokens = torch.randn(1, options.num_heads, coords.shape[1], options.dim // options.num_heads)
    tokens = tokens.to(options.device)
    cells = Coordinates(coords).cells(SUMMARIES)
    find = timed(lambda: Coordinates(coords).cells(SUMMARIES), options.repetitions)
    pool = timed(lambda: pool_by_coordinates(tokens, cells), options.repetitions)
    return {"find_cells_seconds": find, "pool_seconds": pool}


def measure_size(tiles: int, built: dict[str, nn.Module], options: Options) -> dict[str, Any]:
    """One number of tiles."""
    features, coords = draw(tiles, options)
    given: dict[str, Any] = {"repetitions": options.repetitions, "budget": options.budget}
    names = [name for name in built if name != "softmax" or tiles <= options.softmax_tiles]
    calls = {name: partial(forward, built[name], features, coords) for name in names}
    times = medians(interleaved(calls, options.device, **given))
    row: dict[str, Any] = {"tiles": tiles, "depth": options.depth, "features_gib": features.nbytes / GIB}
    for name in names:
        row[f"{name}_seconds"] = times[name]
        row[f"{name}_gib"] = memory(calls[name], options.device).peak / GIB
    row |= parts(options, coords)
    step = training_step(options, features, coords)
    row["training_step_seconds"] = medians(interleaved({"step": step}, options.device, **given))["step"]
    row["training_step_gib"] = memory(step, options.device).peak / GIB
    return row


def growth(model: nn.Module, options: Options) -> dict[int, float]:
    """Seconds of a forward pass by number of tiles."""
    calls = {str(tiles): partial(forward, model, *draw(tiles, options)) for tiles in options.tiles}
    times = interleaved(calls, options.device, repetitions=options.repetitions, budget=options.budget)
    return {int(tiles): seconds for tiles, seconds in medians(times).items()}


def measure(built: dict[str, nn.Module], options: Options) -> list[dict[str, Any]]:
    """All numbers of tiles, as given."""
    rows = []
    for tiles in options.tiles:
        rows.append(measure_size(tiles, built, options))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def ratios(rows: list[dict[str, Any]], seconds: dict[int, float]) -> dict[str, float]:
    """t(N) / t(50,000) of the CBSA model; what its parts take of the model and of a layer."""
    found = {}
    for row in rows:
        tiles, whole = row["tiles"], row["cbsa_seconds"]
        found[f"find_cells_of_model_{tiles}"] = row["find_cells_seconds"] / whole
        found[f"pool_of_layer_{tiles}"] = row["pool_seconds"] / whole * row["depth"]
        if 50_000 in seconds and tiles != 50_000:
            found[f"t({tiles})/t(50000)"] = seconds[tiles] / seconds[50_000]
    return found


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(options.threads)
    built = models(options)
    seconds = growth(built["cbsa"], options)
    rows = measure(built, options)
    columns = ("cbsa", "nystrom", "softmax", "training_step")
    table = Table("tiles", *(f"{name} {unit}" for name in columns for unit in ("s", "GiB")))
    for row in rows:
        cells = [row.get(f"{name}_{unit}") for name in columns for unit in ("seconds", "gib")]
        table.add_row(f"{row['tiles']:,}", *("" if cell is None else f"{cell:.2f}" for cell in cells))
    Console().print(table)
    for name, value in ratios(rows, seconds).items():
        print(f"{name}: {value:.3g}")
    record = {
        "date": datetime.date.today().isoformat(),
        "environment": environment(),
        "options": {key: str(value) for key, value in vars(options).items()},
        "rows": rows,
        "growth_seconds": seconds,
        "ratios": ratios(rows, seconds),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=2) + "\n")
    print(f"results: {options.output}")


if __name__ == "__main__":
    main()
