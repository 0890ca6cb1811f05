"""Test accuracy of the digits recipe over several seeds: mean and standard deviation, as a table and JSON.

    python benchmarks/digits_accuracy.py [--seeds 0 1 2] [--output benchmarks/results/digits_accuracy.json]

The split is the same for every seed (1,257 training, 180 validation, 360 test images); the weights are those of
the last epoch, so that nothing is chosen by accuracy.
"""

from __future__ import annotations

import datetime
import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from cbsa_torch.train import evaluate_checkpoint, load_config, train
from cbsa_torch.train.run_folder import environment


@dataclass
class Options:
    """Train the digits recipe once per seed and test it."""

    seeds: tuple[int, ...] = (0, 1, 2)
    runs: Path = Path("runs/digits_accuracy")
    """Folder of the runs."""
    output: Path = Path("benchmarks/results/digits_accuracy.json")


def measure(options: Options) -> dict[str, Any]:
    """Train and test once per seed."""
    recipe = load_config("digits")
    rows = []
    for seed in options.seeds:
        start = time.monotonic()
        folder = options.runs / f"seed{seed}"
        train(replace(recipe, output=str(folder), seed=seed, overwrite=True))
        seconds = time.monotonic() - start
        rows.append({"seed": seed, "test_top1": evaluate_checkpoint(folder).top1, "train_seconds": seconds})
    accuracies = [row["test_top1"] for row in rows]
    return {
        "date": datetime.date.today().isoformat(),
        "environment": environment(),
        "runs": rows,
        "mean": statistics.mean(accuracies),
        "sd": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
    }


def main() -> None:
    options = tyro.cli(Options)
    record = measure(options)
    table = Table("seed", "test accuracy", "training (s)")
    for row in record["runs"]:
        table.add_row(str(row["seed"]), f"{row['test_top1']:.4f}", f"{row['train_seconds']:.0f}")
    Console().print(table)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=2) + "\n")
    print(f"mean test accuracy: {record['mean']:.4f}  sd: {record['sd']}  results: {options.output}")


if __name__ == "__main__":
    main()
