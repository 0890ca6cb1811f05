"""Train by a recipe with several seeds: accuracy on validation and test, its spread, and the time it takes.

    python benchmarks/recipe_accuracy.py animals28 [--seeds 0 1 2]

An interrupted command goes on where it was. Results go to ``benchmarks/results/accuracy_RECIPE.json``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import tyro
from rich.console import Console
from rich.table import Table

from cbsa_torch._core.files import write_atomically
from cbsa_torch.train import evaluate_checkpoint, load_config, train
from cbsa_torch.train.run.folder import RunFolder, environment


@dataclass
class Options:
    """Train by a recipe with several seeds."""

    recipe: tyro.conf.Positional[str]
    seeds: tuple[int, ...] = (0, 1, 2)
    threads: int | None = None
    """Default: the recipe's."""
    runs: Path = Path("runs/recipe_accuracy")
    """Folder of the runs."""


def main() -> None:
    options = tyro.cli(Options)
    recipe = load_config(options.recipe)
    rows = []
    for seed in options.seeds:
        config = replace(
            recipe,
            output=str(options.runs / f"{options.recipe}_seed{seed}"),
            seed=seed,
            engine=replace(recipe.engine, threads=options.threads or recipe.engine.threads),
        )
        result = train(config)
        history = RunFolder(config.output).read_metrics()
        seen = history[0]["step"] * config.optim.batch_size  # images of an epoch
        minutes = sum(seen / row["images_per_second"] for row in history) / 60
        rows.append(
            {
                "seed": seed,
                "val_top1": evaluate_checkpoint(config.output, split="val").top1,
                "test_top1": evaluate_checkpoint(config.output).top1,
                "best_epoch": result.best_epoch,
                "images_per_second": mean(row["images_per_second"] for row in history),
                "training_minutes": minutes,
            }
        )
    summary = {
        key: {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else None}
        for key in ("val_top1", "test_top1")
        for values in [[row[key] for row in rows]]
    }
    table = Table("seed", "validation", "test", "kept epoch", "images/s", "training minutes", box=None)
    for row in rows:
        table.add_row(
            str(row["seed"]), f"{row['val_top1']:.4f}", f"{row['test_top1']:.4f}", str(row["best_epoch"]),
            f"{row['images_per_second']:.0f}", f"{row['training_minutes']:.1f}",
        )  # fmt: skip
    Console().print(table)
    for key, value in summary.items():
        sd = "" if value["sd"] is None else f", sd {value['sd']:.4f}"
        print(f"{key}: mean {value['mean']:.4f}{sd}")
    record = {
        "recipe": options.recipe,
        "threads": options.threads or recipe.engine.threads,
        "environment": environment(),
        "rows": rows,
        **summary,
    }
    output = Path(f"benchmarks/results/accuracy_{options.recipe}.json")
    write_atomically(output, (json.dumps(record, indent=2) + "\n").encode())
    print(f"results: {output}")


if __name__ == "__main__":
    main()
