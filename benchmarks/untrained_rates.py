"""Rank correlations of Fig. 6 for models with fresh weights: what of them is mechanical.

    python benchmarks/untrained_rates.py [--seeds 0 1 2 3 4 5 6 7]

Digits, 256 test images, the recipe's model. Results go to ``benchmarks/results/untrained_rates.json``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from cbsa_torch import interpret
from cbsa_torch._core.files import write_atomically
from cbsa_torch.train import TrainConfig, load_config
from cbsa_torch.train.build import build_model
from cbsa_torch.train.data import input_spec, make_loader, open_splits
from cbsa_torch.train.run.folder import environment

RESULTS = Path("benchmarks/results/untrained_rates.json")
READINGS = {
    "correlation": "W - A C",
    "correlation_added": "W + A C",
    "correlation_learned": "W + kappa A C",
    "correlation_output": "A C",
}


@dataclass
class Options:
    """Correlate the reduced rates of untrained models."""

    seeds: tuple[int, ...] = tuple(range(8))
    images: int = 256


def main() -> None:
    options = tyro.cli(Options)
    config = load_config("digits")
    assert isinstance(config, TrainConfig)
    rows = []
    for seed in options.seeds:
        torch.manual_seed(seed)
        model = build_model(config, 10)[0].eval()
        spec = input_spec(model)
        test = open_splits(config.data, spec.mode).test
        assert test is not None, "digits have a test split"
        loader = make_loader(test, spec, config.data, options.images, train=False)
        reduced = interpret.reduced_rates(model, [next(iter(loader))[0]])
        rows.append({"seed": seed, **{key: getattr(reduced, key) for key in READINGS}})
    table = Table("seed", *READINGS.values(), box=None)
    for row in rows:
        table.add_row(str(row["seed"]), *(f"{row[key]:+.2f}" for key in READINGS))
    Console().print(table)
    record = {"environment": environment(), "images": options.images, "rows": rows}
    write_atomically(RESULTS, (json.dumps(record, indent=2) + "\n").encode())
    print(f"results: {RESULTS}")


if __name__ == "__main__":
    main()
