"""CBSA, MSSA and MHSA decoders on emoji-scenes: accuracy, cost, and noise on their parameters (Fig. 8).

    python benchmarks/segmentation_decoders.py

Trains one encoder on emoji64, then every decoder on top of it with every seed by the recipe ``emoji_scenes``,
two runs at a time with one thread each. Finished runs are kept and read again. Writes a table, a record
(``benchmarks/results/segmentation_decoders.json``) and a plot (``docs/images/segmentation_decoders.png``).
Needs ``cbsa data fetch emoji64``.
"""

from __future__ import annotations

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
from typing import Any, NamedTuple

import torch
import tyro
from accelerate import Accelerator
from matplotlib.figure import Figure
from rich.progress import track
from torch import nn

from cbsa_torch._core.files import write_atomically
from cbsa_torch.interpret import robustness
from cbsa_torch.interpret.capture import attention_layers
from cbsa_torch.interpret.plots import to_png
from cbsa_torch.models import segmenter
from cbsa_torch.models.counting import count_model
from cbsa_torch.train import TrainConfig, evaluate_checkpoint, load_config
from cbsa_torch.train.config import RunConfig, dump_yaml
from cbsa_torch.train.evaluate import open_trained
from cbsa_torch.train.run.folder import RunFolder, changed_keys, environment
from cbsa_torch.train.tasks.segmentation import (
    SegmentationTrainConfig,
    miou_without,
)
from cbsa_torch.train.tasks.segmentation.evaluation import share
from cbsa_torch.train.tasks.segmentation.transforms import evaluation_transform

MIXERS = {"cbsa": "CBSA (CBT)", "mssa": "MSSA (DEPICT)", "mhsa": "MHSA (Segmenter)"}
COLOURS = {"cbsa": "#1f77b4", "mssa": "#ff7f0e", "mhsa": "#2ca02c"}
LINES = {"cbsa": "-", "mssa": "-", "mhsa": "--"}
"""MSSA and MHSA cost nearly the same."""
REPEATED = ("Flags", "Symbols")
"""Classes whose masks repeat between the splits."""
SIGMAS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
SIDES = (64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Of the images whose decoder FLOPs are drawn."""


@dataclass
class Options:
    """What is trained, and how much of it."""

    runs: Path = Path("runs/segmentation_decoders")
    """Folder of the runs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the decoders' runs; the encoder is the same."""
    encoder_epochs: int = 12
    """Epochs of the encoder on emoji64."""
    epochs: int = 8
    """Epochs of every decoder."""
    scenes: int = 1000
    """Training scenes."""
    size: int = 80
    """Side of the scenes in pixels."""
    noise_scenes: int = 60
    """Test scenes of the noise sweep."""
    jobs: int = 2
    """Runs at a time, one thread each."""
    results: Path = Path("benchmarks/results/segmentation_decoders.json")
    """The record."""
    plot: Path = Path("docs/images/segmentation_decoders.png")
    """The plot."""


def encoder_folder(options: Options) -> Path:
    """Of the encoder's run, whose name the decoders' configurations hold: with another they train anew."""
    return options.runs / f"encoder_{options.encoder_epochs}_epochs"


def encoder_configuration(options: Options) -> TrainConfig:
    """The recipe of emoji64, shorter."""
    recipe = load_config("emoji64")
    assert isinstance(recipe, TrainConfig)
    optim = replace(recipe.optim, epochs=options.encoder_epochs)
    return replace(
        recipe,
        output=str(encoder_folder(options)),
        optim=optim,
        engine=replace(recipe.engine, threads=options.jobs, tracker="none"),
    )


def configuration(options: Options, mixer: str, seed: int) -> SegmentationTrainConfig:
    """The recipe of emoji-scenes with another decoder and seed."""
    recipe = load_config("emoji_scenes")
    assert isinstance(recipe, SegmentationTrainConfig)
    args = {**recipe.model.args, "mixer": mixer}
    scenes = replace(
        recipe.data.scenes, size=options.size, train=options.scenes, val=options.scenes // 10, test=300
    )
    return replace(
        recipe,
        output=str(options.runs / f"{mixer}_seed{seed}"),
        seed=seed,
        model=replace(recipe.model, args=args, encoder_from=str(encoder_folder(options))),
        data=replace(recipe.data, scenes=scenes, crop_size=options.size, base_size=options.size, workers=0),
        optim=replace(recipe.optim, epochs=options.epochs),
        engine=replace(recipe.engine, threads=1, tracker="none"),
    )


def train_once(config: RunConfig) -> float:
    """Train in a process of its own, or go on, unless that is done; the seconds that it took in all."""
    folder = RunFolder(config.output)
    taken = folder.path.with_suffix(".seconds")
    before = 0.0
    changed = folder.config.exists() and bool(changed_keys(load_config(folder.config), config))
    if folder.config.exists() and not changed:
        before = float(taken.read_text()) if taken.exists() else 0.0
        done = folder.read_metrics()
        if done and done[-1]["epoch"] == config.optim.epochs:
            return before
    source = folder.path.with_suffix(".yaml")
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(dump_yaml(config))
    command = [sys.executable, "-m", "cbsa_torch.cli", "train", "--config", str(source)]
    command += ["--overwrite"] if changed else []
    start = time.perf_counter()
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(config.engine.threads)},
    )
    seconds = before + time.perf_counter() - start
    if folder.config.exists():
        taken.write_text(str(seconds))
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    return seconds


def test_once(options: Options, mixer: str, seed: int) -> dict[str, Any]:
    """Mean IoU on the test scenes, with all classes and less those that repeat."""
    result = evaluate_checkpoint(configuration(options, mixer, seed).output)
    return {
        "miou": result.scores.miou,
        "miou_without_repeated": miou_without(result.scores, REPEATED),
        "pixel_accuracy": result.scores.pixel_accuracy,
        "iou": {name: one.iou for name, one in result.scores.classes.items()},
    }


def sweep_once(options: Options, mixer: str, seed: int) -> dict[str, Any]:
    """Mean IoU on the first test scenes under noise on the decoder's attention layers alone."""
    trained = open_trained(configuration(options, mixer, seed).output)
    task = trained.task
    dataset: Any = task.open_split(trained.spec.mode, trained.class_names, "test").dataset
    dataset.transform = evaluation_transform(trained.spec.mean, trained.spec.std)
    accelerator = Accelerator(cpu=True)
    scenes: Any = [dataset[i] for i in range(options.noise_scenes)]  # drawn once for all

    def miou(model: nn.Module) -> float:
        images = share(scenes, 0, accelerator)
        return task.evaluate(accelerator, model, images, trained.class_names).score

    layers = [name for name in attention_layers(trained.model) if name.startswith("decoder.")]
    measured = robustness(trained.model, miou, sigmas=SIGMAS, layers=layers)
    return {"clean": measured.clean, "values": measured.values}


class Outcome(NamedTuple):
    """Of one decoder with one seed."""

    seconds: float
    """Of its training."""
    test: dict[str, Any]
    noise: dict[str, Any]


def run_once(options: Options, mixer: str, seed: int) -> Outcome:
    """Train, test and disturb one decoder."""
    seconds = train_once(configuration(options, mixer, seed))
    return Outcome(seconds, test_once(options, mixer, seed), sweep_once(options, mixer, seed))


def decoder_cost(mixer: str, side: int, args: dict[str, Any]) -> dict[str, int]:
    """FLOPs and similarities of the decoder's layers, and its parameters."""
    with torch.device("meta"):  # softmax attention of a large image would not fit into memory
        model = segmenter(**{**args, "mixer": mixer, "num_classes": 10})
        counted = count_model(model, (3, side, side))
    layers = [one for one in counted.layers if one.name.startswith("decoder")]
    return {
        "flops": sum(one.counts.flops for one in layers),
        "similarities": sum(one.counts.similarities for one in layers),
        "parameters": sum(one.parameters for one in layers),
    }


def run(options: Options) -> dict[str, Any]:
    """Everything, and count."""
    torch.set_num_threads(1)  # of this process, which tests small models
    start = time.perf_counter()
    print("training the encoder")
    seconds = {"encoder": train_once(encoder_configuration(options))}
    pairs = list(itertools.product(MIXERS, options.seeds))
    outcomes: dict[tuple[str, int], Outcome] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        done = pool.map(lambda pair: run_once(options, *pair), pairs)
        for pair, outcome in zip(pairs, track(done, "decoders", total=len(pairs)), strict=True):
            outcomes[pair] = outcome
            seconds[f"{pair[0]}_seed{pair[1]}"] = outcome.seconds
    rows = []
    for mixer in MIXERS:
        args = open_trained(configuration(options, mixer, options.seeds[0]).output).info["model_args"]
        tests = [outcomes[mixer, seed].test for seed in options.seeds]
        rows.append(
            {
                "mixer": mixer,
                "tests": tests,
                **{key: summary([test[key] for test in tests]) for key in ("miou", "miou_without_repeated")},
                "noise": [outcomes[mixer, seed].noise for seed in options.seeds],
                "cost": decoder_cost(mixer, options.size, args),
                "cost_by_side": [decoder_cost(mixer, side, args) for side in SIDES],
            }
        )
    return {
        "date": datetime.date.today().isoformat(),
        "environment": environment(),
        "options": {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()},
        "sigmas": SIGMAS,
        "sides": SIDES,
        "rows": rows,
        "training_seconds": seconds,
        "seconds": time.perf_counter() - start,
    }


def summary(values: list[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation."""
    return {
        "mean": statistics.mean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
    }


def left_under_noise(row: dict[str, Any]) -> list[float]:
    """The share of its clean mean IoU that a decoder keeps at every sigma, over seeds and draws of noise."""
    return [
        statistics.mean(value / sweep["clean"] for sweep in row["noise"] for value in sweep["values"][index])
        for index in range(len(SIGMAS))
    ]


def markdown(record: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "| decoder | mean IoU (%) | without Flags and Symbols | MFLOPs | similarities | parameters | "
        "kept at 0.03 | at 0.1 | at 1 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        left = left_under_noise(row)
        kept = " | ".join(f"{100 * left[SIGMAS.index(sigma)]:.0f} %" for sigma in (3e-2, 1e-1, 1.0))
        cost = row["cost"]
        lines.append(
            f"| {MIXERS[row['mixer']]} | {percent(row['miou'])} | {percent(row['miou_without_repeated'])} | "
            f"{cost['flops'] / 1e6:.0f} | {cost['similarities']:,} | {cost['parameters']:,} | {kept} |"
        )
    return "\n".join(lines)


def percent(value: dict[str, float | None]) -> str:
    """Mean ± standard deviation in percent."""
    mean, sd = value["mean"], value["sd"]
    assert mean is not None
    return f"{100 * mean:.1f}" + ("" if sd is None else f" ± {100 * sd:.1f}")


def draw(record: dict[str, Any]) -> Figure:
    """Noise, FLOPs, similarities."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    noise, flops, similarities = figure.subplots(1, 3)
    for row in record["rows"]:
        name, colour = MIXERS[row["mixer"]], COLOURS[row["mixer"]]
        clean = [sweep["clean"] for sweep in row["noise"]]
        means, spreads = [statistics.mean(clean)], [statistics.pstdev(clean)]
        for index in range(len(SIGMAS)):
            values = [value for sweep in row["noise"] for value in sweep["values"][index]]
            means.append(statistics.mean(values))
            spreads.append(statistics.pstdev(values))
        places = [SIGMAS[0] / 3, *SIGMAS]
        noise.errorbar(
            places, [100 * m for m in means], [100 * s for s in spreads], color=colour, label=name, capsize=2
        )
        line = LINES[row["mixer"]]
        for axes, key, unit in ((flops, "flops", 1e9), (similarities, "similarities", 1e6)):
            axes.plot(
                SIDES,
                [cost[key] / unit for cost in row["cost_by_side"]],
                line,
                marker=".",
                color=colour,
                label=name,
            )
    noise.set(
        xscale="log",
        xlabel="standard deviation of the noise\non the decoder's attention",
        ylabel="mean IoU on test scenes (%)",
        title="Noise on the parameters",
    )
    noise.set_xticks([SIGMAS[0] / 3, 1e-2, 1e-1, 1], ["none", "0.01", "0.1", "1"])
    noise.minorticks_off()
    flops.set(ylabel="GFLOPs", title="Decoder FLOPs")
    similarities.set(ylabel="millions", title="Pairwise similarities")
    for axes in (flops, similarities):
        axes.set(xscale="log", yscale="log", xlabel="side of the image (pixels)")
        axes.set_xticks(SIDES[::2], [str(side) for side in SIDES[::2]])
        axes.minorticks_off()
    for axes in (noise, flops, similarities):
        axes.grid(alpha=0.3)
        axes.title.set_fontsize(10)
    figure.legend(*noise.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def main() -> None:
    """Run, write, print."""
    options = tyro.cli(Options, description=__doc__)
    record = run(options)
    for path in (options.results, options.plot):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.results, json.dumps(record, indent=2).encode())
    write_atomically(options.plot, to_png(draw(record)))
    print(markdown(record))
    print(f"{record['seconds'] / 60:.1f} minutes; record: {options.results}, plot: {options.plot}")


if __name__ == "__main__":
    main()
