"""Train every member of the family on digits by the same command, over several seeds; print a table.

    python benchmarks/digits_family.py [--members cbt] [--seeds 0 1 2] [--jobs 2]

Each run is ``cbsa train --model NAME --seed SEED`` with one thread; finished runs of the same configuration are
kept and not repeated (``--overwrite`` does). The split is the same for every seed (1,257 training, 180
validation, 360 test images) and the weights are those of the last epoch, so that nothing is chosen by accuracy.
Times are measured after all training: steps of all models interleaved, in one process, medians.

With all members the results go to ``benchmarks/results/digits_family.json`` and, as a table, into
``docs/results/small_models.md``; with some, to a file beside the runs.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from cbsa_torch.models.counting import count_model
from cbsa_torch.train import TrainConfig, evaluate_checkpoint, load_config
from cbsa_torch.train.run.folder import RunFolder, environment

MEMBERS: dict[str, tuple[str, dict[str, Any]]] = {
    "cbt": ("cbt_pico_patch1_8", {}),
    "cbt_exact": ("cbt_pico_patch1_8", {"contraction": "exact"}),
    "cbt_tied": ("cbt_pico_patch1_8", {"tied": True, "orthogonal": True}),
    "cbt_rigorous": (
        "cbt_pico_patch1_8",
        {"contraction": "exact", "tied": True, "orthogonal": True, "eps": 1.0},
    ),
    "cbt_learned": ("cbt_pico_patch1_8", {"representatives": "learned"}),
    "cbt_none": ("cbt_pico_patch1_8", {"contraction": "none"}),
    "linear_cbt": ("linear_cbt_pico_patch1_8", {}),
    "crate": ("crate_pico_patch1_8", {}),
    "crate_cbt": ("crate_cbt_pico_patch1_8", {}),
    "tost": ("tost_pico_patch1_8", {}),
    "agent": ("agent_pico_patch1_8", {}),
    "stem_vit": ("stem_vit_pico_patch1_8", {}),
}
"""Name, model and further model arguments."""

STEPS = 15
"""Training steps per model that are timed."""
RESULTS = Path("benchmarks/results/digits_family.json")
DOCS = Path("docs/results/small_models.md")
MARKERS = ("<!-- digits: begin -->", "<!-- digits: end -->")


@dataclass
class Options:
    """Train the family on digits."""

    members: tuple[str, ...] = tuple(MEMBERS)
    seeds: tuple[int, ...] = (0, 1, 2)
    jobs: int = 1
    """Runs at a time, one thread each."""
    overwrite: bool = False
    """Repeat runs that are finished."""
    epochs: int | None = None
    """Default: the recipe's."""
    threads: int = 2
    """CPU threads for the timed steps."""
    runs: Path = Path("runs/digits_family")
    """Folder of the runs."""


def configuration(options: Options, member: str, seed: int) -> TrainConfig:
    """The digits recipe with another model and seed, one thread."""
    recipe = load_config("digits")
    assert isinstance(recipe, TrainConfig)
    name, args = MEMBERS[member]
    return replace(
        recipe,
        output=str(options.runs / f"{member}_seed{seed}"),
        seed=seed,
        model=replace(recipe.model, name=name, args=args),
        optim=replace(recipe.optim, epochs=options.epochs or recipe.optim.epochs),
        engine=replace(recipe.engine, threads=1),
    )


def is_finished(config: TrainConfig) -> bool:
    """Whether a run's folder holds all epochs of this configuration."""
    folder = RunFolder(config.output)
    if not folder.config.exists():
        return False
    kept = replace(load_config(str(folder.config)), overwrite=False, resume=False)
    rows = folder.read_metrics()
    return kept == config and bool(rows) and rows[-1]["epoch"] == config.optim.epochs


def train_once(options: Options, member: str, seed: int) -> tuple[str, float]:
    """Train one member with one seed in a process of its own, unless that is done; the test accuracy."""
    config = configuration(options, member, seed)
    if options.overwrite or not is_finished(config):
        command = [sys.executable, "-m", "cbsa_torch.cli", "train", "--model", config.model.name, "--overwrite"]
        command += ["--output", config.output, "--seed", str(seed), "--engine.threads", "1"]
        command += ["--optim.epochs", str(config.optim.epochs)]
        if config.model.args:
            command += ["--model.args", *map(str, itertools.chain.from_iterable(config.model.args.items()))]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return member, evaluate_checkpoint(config.output).top1


def step_seconds(members: tuple[str, ...], threads: int) -> dict[str, float]:
    """Median seconds of a training step of 64 digits (forward and backward) for each member, interleaved."""
    torch.set_num_threads(threads)
    models = {m: timm.create_model(MEMBERS[m][0], **MEMBERS[m][1]).train() for m in members}
    images, labels = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
    times: dict[str, list[float]] = {member: [] for member in members}
    for repetition in range(STEPS + 1):
        for member, model in models.items():
            start = time.perf_counter()
            nn.functional.cross_entropy(model(images), labels).backward()
            if repetition:  # the first warms up
                times[member].append(time.perf_counter() - start)
    return {member: statistics.median(values) for member, values in times.items()}


def measure(options: Options) -> dict[str, Any]:
    """Train all, test all, count all."""
    unknown = [member for member in options.members if member not in MEMBERS]
    if unknown:
        raise SystemExit(f"no member {unknown[0]!r}; there are {', '.join(MEMBERS)}")
    pairs = list(itertools.product(options.members, options.seeds))
    accuracies: dict[str, list[float]] = {member: [] for member in options.members}
    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda pair: train_once(options, *pair), pairs)
        for member, accuracy in track(results, "training", total=len(pairs)):
            accuracies[member].append(accuracy)
    seconds = step_seconds(options.members, options.threads)
    rows = []
    for member, values in accuracies.items():
        name, args = MEMBERS[member]
        total = count_model(timm.create_model(name, **args), (1, 8, 8)).total
        rows.append(
            {
                "member": member,
                "model": name,
                "model_args": args,
                "test_top1": values,
                "mean": statistics.mean(values),
                "sd": statistics.stdev(values) if len(values) > 1 else None,
                "parameters": total.parameters,
                "flops": total.counts.flops,
                "similarities": total.counts.similarities,
                "step_ms": 1e3 * seconds[member],
            }
        )
    return {
        "date": datetime.date.today().isoformat(),
        "environment": environment(),
        "seeds": list(options.seeds),
        "recipe": dataclasses.asdict(load_config("digits").optim) | {"epochs": options.epochs or "recipe"},
        "timing": {"threads": options.threads, "batch_size": 64, "steps": STEPS},
        "rows": rows,
    }


def markdown(record: dict[str, Any]) -> str:
    """The table of the docs."""
    lines = ["| member | model | test accuracy (%) | parameters | MFLOPs | similarities | step (ms) |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in record["rows"]:
        options = "".join(f", `{key}={value!r}`" for key, value in row["model_args"].items())
        cells = [f"`{row['member']}`", f"`{row['model']}`{options}", *row_cells(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def row_cells(row: dict[str, Any]) -> list[str]:
    """Accuracy, counts and time as text."""
    spread = "" if row["sd"] is None else f" ± {100 * row['sd']:.1f}"
    return [
        f"{100 * row['mean']:.1f}{spread}",
        f"{row['parameters']:,}",
        f"{row['flops'] / 1e6:.1f}",
        f"{row['similarities']:,}",
        f"{row['step_ms']:.0f}",
    ]


def write_docs(record: dict[str, Any]) -> None:
    """Put the table between its markers in the docs."""
    before, rest = DOCS.read_text(encoding="utf-8").split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    table = f"{MARKERS[0]}\n\n{markdown(record)}\n\n{MARKERS[1]}"
    DOCS.write_text(before + table + after, encoding="utf-8")


def main() -> None:
    options = tyro.cli(Options)
    record = measure(options)
    table = Table("member", "test accuracy (%)", "parameters", "MFLOPs", "similarities", "step (ms)")
    for row in record["rows"]:
        table.add_row(row["member"], *row_cells(row))
    Console().print(table)
    whole = set(options.members) == set(MEMBERS) and options.epochs is None
    output = RESULTS if whole else options.runs / "results.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n")
    print(f"results: {output}")
    if whole:
        write_docs(record)
        print(f"table: {DOCS}")


if __name__ == "__main__":
    main()
