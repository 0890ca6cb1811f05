"""Time one attention layer: CBSA (eager, tiled) beside softmax multi-head attention (timm, SDPA), in one run.

    python benchmarks/layers.py [--device cuda] [--dtype bfloat16] [--output benchmarks/results/NAME.json]

Repetitions are interleaved (A B A B ...) so that a machine that drifts drifts for both; medians and their ratio
are printed and written to a JSON file with the date, device and versions.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from timm.layers.attention import Attention
from torch import Tensor, nn

from cbsa_torch import CBSA, __version__


@dataclass
class Options:
    """Time CBSA beside softmax attention."""

    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    dim: int = 384
    num_heads: int = 6
    sides: tuple[int, ...] = (14, 32, 64, 96)
    """Sides of the square token grids."""
    batch_size: int = 1
    repetitions: int = 7
    threads: int = 2
    """CPU threads."""
    output: Path = Path("benchmarks/results/layers.json")


def synchronize(device: str) -> None:
    """Wait until the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(layer: nn.Module, x: Tensor, train: bool) -> float:
    """Wall time of one forward pass, or of one forward and backward pass."""
    synchronize(x.device.type)
    start = time.perf_counter()
    with torch.set_grad_enabled(train):
        out = layer(x)
        if train:
            out.sum().backward()
    synchronize(x.device.type)
    return time.perf_counter() - start


def measure(options: Options) -> list[dict[str, Any]]:
    """Time every size, forward and training step."""
    dtype = getattr(torch, options.dtype)
    kind: Any = {"device": options.device, "dtype": dtype}
    layers = {
        "cbsa": CBSA(options.dim, options.num_heads, **kind),
        "tiled": CBSA(options.dim, options.num_heads, impl="tiled", **kind),
        "mhsa": Attention(options.dim, options.num_heads, **kind),
    }
    rows = []
    for side in options.sides:
        x = torch.randn(options.batch_size, side * side, options.dim, requires_grad=True, **kind)
        for train in (False, True):
            times: dict[str, list[float]] = {name: [] for name in layers}
            for repetition in range(options.repetitions + 1):
                for name, layer in layers.items():
                    duration = seconds(layer, x, train)
                    if repetition:  # the first warms up
                        times[name].append(duration)
            medians = {name: statistics.median(values) for name, values in times.items()}
            rows.append(
                {
                    "tokens": side * side,
                    "pass": "train" if train else "forward",
                    **{f"{name}_ms": 1e3 * value for name, value in medians.items()},
                    "mhsa_over_cbsa": medians["mhsa"] / medians["cbsa"],
                    "tiled_over_cbsa": medians["tiled"] / medians["cbsa"],
                }
            )
    return rows


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(options.threads)
    cuda = options.device.startswith("cuda")
    rows = measure(options)
    table = Table("tokens", "pass", "CBSA ms", "tiled ms", "MHSA ms", "tiled / CBSA", "MHSA / CBSA")
    for row in rows:
        keys = ("cbsa_ms", "tiled_ms", "mhsa_ms", "tiled_over_cbsa", "mhsa_over_cbsa")
        numbers = [f"{row[key]:.2f}" for key in keys]
        table.add_row(str(row["tokens"]), row["pass"], *numbers)
    Console().print(table)
    record = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "versions": {
            "cbsa_torch": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "options": {key: str(value) for key, value in vars(options).items()},
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=2) + "\n")
    print(f"results: {options.output}")


if __name__ == "__main__":
    main()
