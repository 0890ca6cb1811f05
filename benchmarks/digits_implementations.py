"""Train on digits with every implementation of the operator: the accuracy must not depend on it.

    python benchmarks/digits_implementations.py [--impls eager tiled] [--seeds 0]

The same seed draws the same weights, batches and augmentation, so that runs differ by rounding alone, which
training amplifies. Results go to ``benchmarks/results/digits_implementations.json``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from cbsa_torch.train import evaluate_checkpoint, load_config, train
from cbsa_torch.train.run.folder import RunFolder, environment

RESULTS = Path("benchmarks/results/digits_implementations.json")


@dataclass
class Options:
    """Train on digits with every implementation."""

    impls: tuple[str, ...] = ("eager", "tiled")
    """Also "triton" on a CUDA device."""
    seeds: tuple[int, ...] = (0,)
    epochs: int | None = None
    """Default: the recipe's."""
    threads: int = 2
    runs: Path = Path("runs/digits_implementations")
    """Folder of the runs."""
    output: Path = RESULTS


def main() -> None:
    options = tyro.cli(Options)
    recipe = load_config("digits")
    table = Table("implementation", "seed", "validation loss", "test accuracy", box=None)
    rows = []
    for seed in options.seeds:
        for impl in options.impls:
            config = replace(
                recipe,
                output=str(options.runs / f"{impl}_seed{seed}"),
                seed=seed,
                overwrite=True,
                model=replace(recipe.model, args={**recipe.model.args, "impl": impl}),
                optim=replace(recipe.optim, epochs=options.epochs or recipe.optim.epochs),
                engine=replace(recipe.engine, threads=options.threads),
            )
            train(config)
            loss = RunFolder(config.output).read_metrics()[-1]["val_loss"]
            top1 = evaluate_checkpoint(config.output).top1
            rows.append({"impl": impl, "seed": seed, "val_loss": loss, "test_top1": top1})
            table.add_row(impl, str(seed), f"{loss:.5f}", f"{top1:.4f}")
    Console().print(table)
    record = {"environment": environment(), "epochs": options.epochs or recipe.optim.epochs, "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=2) + "\n")
    print(f"results: {options.output}")


if __name__ == "__main__":
    main()
