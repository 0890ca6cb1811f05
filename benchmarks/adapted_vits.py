"""ViTs adapted to CBSA*, CBSA∨ and linear attention, and recovered: accuracy on two data sets, and cost.

    python benchmarks/adapted_vits.py

For animals28 and emoji64, side by side with one thread each: trains a small ViT by the recipe ``animals28_vit``
or ``emoji64_vit``, then runs ``adapt_table.py`` on it with three seeds. Then times a ViT-S and its adapted
forms at several image sizes, alone on the machine. Finished runs are kept and read again. Writes
``benchmarks/results/adapted_{animals28,emoji64,cost}.{json,md}`` and the plot
``docs/images/adapted_vits.png``. Needs ``cbsa data fetch animals28`` and ``cbsa data fetch emoji64``.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cbsa_torch._core.files import write_atomically
from cbsa_torch.interpret.plots import to_png

EPOCHS = {"animals28": 2, "emoji64": 3}
"""Of the recoveries."""
NAMES = {
    "original": "original",
    "adapted_cbsa contraction_step=1": "CBSA*, from 1",
    "adapted_cbsa": "CBSA*, from 0",
    "agent": "CBSA\u2228",
    "linear": "linear",
}
COLOURS = dict(zip(NAMES, ("#555555", "#1f77b4", "#17becf", "#ff7f0e", "#2ca02c"), strict=True))


@dataclass
class Options:
    """What is adapted, and how it is recovered."""

    runs: Path = Path("runs/adapted_vits")
    """Folder of the runs and the logs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the recoveries; the original is the same."""
    lr: float = 5e-4
    """Of the recoveries."""
    batch_size: int = 64
    """Of the recoveries."""
    cost_of: str = "vit_small_patch16_224"
    """The ViT of timm that is timed, with random weights."""
    image_sizes: tuple[int, ...] = (224, 384, 1024)
    """At which it is timed."""
    results: Path = Path("benchmarks/results")
    """Folder of the records."""
    plot: Path = Path("docs/images/adapted_vits.png")
    """The plot."""


CBSA = ("-m", "cbsa_torch.cli")
TABLE = (str(Path(__file__).with_name("adapt_table.py")),)


def run_python(log: Path, *args: str) -> None:
    """Run Python, with what it says in a file.

    Raises:
        RuntimeError: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        command = [sys.executable, *args]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False, env=environment)
    if result.returncode:
        raise RuntimeError(f"python {' '.join(args)} failed; its output is in {log}")


def accuracies(options: Options, name: str) -> None:
    """Train the ViT of a data set, adapt and recover it."""
    vit, table, log = (options.runs / f"{name}{end}" for end in ("_vit", "_table", ".log"))
    run_python(log, *CBSA, "train", "--config", f"{name}_vit", "--output", str(vit))
    run_python(
        log, *TABLE, "--model", str(vit), "--output", str(table), "--image-sizes", "--threads", "1",
        "--seeds", *map(str, options.seeds), "--epochs", str(EPOCHS[name]), "--lr", str(options.lr),
        "--batch-size", str(options.batch_size),
    )  # fmt: skip
    keep(options, table, name)


def costs(options: Options) -> None:
    """Time the original and its adapted forms."""
    table = options.runs / "cost_table"
    run_python(
        options.runs / "cost.log", *TABLE, "--model", str(options.runs / "animals28_vit"),
        "--cost-of", options.cost_of, "--output", str(table), "--seeds",
        "--image-sizes", *map(str, options.image_sizes),
    )  # fmt: skip
    keep(options, table, "cost")


def keep(options: Options, table: Path, name: str) -> None:
    """Copy a finished table to the results."""
    options.results.mkdir(parents=True, exist_ok=True)
    for suffix in (".json", ".md"):
        shutil.copyfile(f"{table}{suffix}", options.results / f"adapted_{name}{suffix}")


def read(options: Options, name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((options.results / f"adapted_{name}.json").read_text())
    return record


def draw(options: Options) -> Figure:
    """Accuracy on each data set, and images/s against the size of the image."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, name in zip(panels, EPOCHS, strict=False):
        draw_accuracies(axes, read(options, name)["accuracy"])
        axes.set_title(f"{name}: {EPOCHS[name]} epochs of recovery", fontsize=10)
    rows = read(options, "cost")["cost"]
    for name, label in NAMES.items():
        own = [row for row in rows if row["name"] == name]
        speeds = [row["images_per_second"] for row in own]
        panels[2].plot([row["image_size"] for row in own], speeds, ".-", color=COLOURS[name], label=label)
    panels[2].set(xscale="log", yscale="log", xlabel="side of the image (pixels)", ylabel="images/s")
    panels[2].set_xticks(options.image_sizes, [str(size) for size in options.image_sizes])
    panels[2].minorticks_off()
    panels[2].set_title(f"Speed of {options.cost_of}", fontsize=10)
    panels[2].grid(alpha=0.3)
    for axes in panels[[0, 2]]:
        axes.legend(fontsize=8)
    return figure


def draw_accuracies(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """For each way to adapt: before recovery, after it, and after it with the original as a teacher."""
    marks = {"before": ("x", "before"), "plain": ("o", "after"), "distilled": ("^", "after, distilled")}
    for offset, (key, (mark, label)) in zip((0.0, -0.12, 0.12), marks.items(), strict=True):
        for place, row in enumerate(rows):
            values = row.get(key, [])
            values = [100 * value for value in (values if isinstance(values, list) else [values])]
            if not values:
                continue
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            axes.errorbar(
                [place + offset], [statistics.mean(values)], [spread], fmt=mark, capsize=2,
                color=COLOURS[row["name"]], mfc="none" if key == "plain" else None,
            )  # fmt: skip
        axes.plot([], [], mark, color="black", mfc="none" if key == "plain" else None, label=label)
    axes.set_xticks(range(len(rows)), [NAMES[row["name"]].replace(", ", "\n") for row in rows])
    axes.set_ylabel("test accuracy (%)")
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(alpha=0.3, axis="y")


def main() -> None:
    """Run, write, print."""
    options = tyro.cli(Options, description=__doc__)
    print(f"progress is written to {options.runs}/*.log", flush=True)
    with ThreadPoolExecutor(len(EPOCHS)) as pool:
        list(pool.map(lambda name: accuracies(options, name), EPOCHS))
    costs(options)
    write_atomically(options.plot, to_png(draw(options)))
    for name in (*EPOCHS, "cost"):
        print(f"\n{name}\n{(options.results / f'adapted_{name}.md').read_text()}")
    print(f"records: {options.results}/adapted_*.json, plot: {options.plot}")


if __name__ == "__main__":
    main()
