"""What the interpretability toolkit costs on the CPU, against its limits: memory of capture, time of the rates.

    OMP_NUM_THREADS=1 python benchmarks/interpret_cost.py

Memory: a process of its own captures all layers of the model; counted is what its resident memory grows by, at
its peak, from the moment before the first forward pass (Linux). Time: ``measure_rates`` and the plain forward
pass are called in turn, and the ratio is the median over the pairs.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import re
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import cbsa_torch.models  # noqa: F401  (registers our models with timm)
from cbsa_torch import interpret
from cbsa_torch.bench.measure import forward, interleaved, medians
from cbsa_torch.train.run.folder import environment

MEMORY_LIMIT_GIB = 3.0
TIME_LIMIT = 3.0

PASSES = ("plain", "capture", "capture_training")
"""Forward passes whose memory is measured: without capture, all layers captured, the same with gradients on."""


@dataclass(frozen=True)
class Options:
    """Measure the cost of capture and of the rates."""

    model: str = "cbt_small_patch16_224"
    image_size: int = 224
    channels: int = 3
    batch_size: int = 16
    repetitions: int = 7
    """Pairs of passes that are timed."""
    threads: int = 1
    """CPU threads."""
    output: Path = Path("benchmarks/results/interpret_cost.json")


def measure(options: Options) -> dict[str, Any]:
    """Memory in GiB, times in seconds, and whether the limits hold."""
    peaks = {name: in_a_process(options, name) for name in PASSES}
    torch.set_num_threads(options.threads)
    model, images = build(options)
    times = interleaved(
        {"plain": lambda: forward(model, images), "rates": lambda: interpret.measure_rates(model, [images])},
        "cpu",
        repetitions=options.repetitions,
        budget=600,
    )
    ratios = [rates / plain for plain, rates in zip(times["plain"], times["rates"], strict=True)]
    ratio = statistics.median(ratios)
    return {
        "gib": peaks,
        "memory_limit_gib": MEMORY_LIMIT_GIB,
        "memory_holds": max(peaks["capture"], peaks["capture_training"]) <= MEMORY_LIMIT_GIB,
        "seconds": medians(times),
        "ratio": ratio,
        "ratios": ratios,
        "time_limit": TIME_LIMIT,
        "time_holds": ratio <= TIME_LIMIT,
    }


def in_a_process(options: Options, forward_pass: str) -> float:
    """:func:`growth` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(growth, options, forward_pass).result()


def growth(options: Options, forward_pass: str) -> float:
    """GiB that the first forward pass of this process adds at its peak: one of :data:`PASSES`."""
    torch.set_num_threads(options.threads)
    model, images = build(options)
    before = resident_gib("VmRSS")
    with torch.set_grad_enabled(forward_pass == "capture_training"):
        if forward_pass == "plain":
            model(images)
        else:
            with interpret.capture(model) as records:
                output = model(images)
            assert records, "kept until here"
            del output
    return resident_gib("VmHWM") - before


def resident_gib(line: str) -> float:
    """What is resident in this process now (VmRSS), or was at most (VmHWM); ``ru_maxrss`` would begin with the
    parent's.
    """
    found = re.search(rf"^{line}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 2**20


def build(options: Options) -> tuple[nn.Module, Tensor]:
    """The model in eval mode, and noise for images."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(options.model, img_size=options.image_size).eval()
    return model, torch.randn(options.batch_size, options.channels, options.image_size, options.image_size)


def main() -> None:
    options = tyro.cli(Options)
    found = measure(options)
    gib, seconds = found["gib"], found["seconds"]
    trained = f"with gradients {gib['capture_training']:.2f}, plain {gib['plain']:.2f}"
    memory = f"{gib['capture']:.2f} GiB ({trained})"
    time = f"{found['ratio']:.2f} ({seconds['rates']:.2f} s / {seconds['plain']:.2f} s)"
    table = Table("cost", "measured", "limit", "holds")
    for name, value, limit, holds in (
        ("capture of all layers", memory, f"{MEMORY_LIMIT_GIB:g} GiB", found["memory_holds"]),
        ("measure_rates / plain forward", time, f"{TIME_LIMIT:g}", found["time_holds"]),
    ):
        table.add_row(name, value, limit, "yes" if holds else "NO")
    Console().print(table)
    record = {
        "date": datetime.date.today().isoformat(),
        "environment": environment(),
        "options": {key: str(value) for key, value in vars(options).items()},
        **found,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=2) + "\n")
    print(f"results: {options.output}")


if __name__ == "__main__":
    main()
