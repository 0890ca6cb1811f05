"""``cbsa compare``: several runs on the same images, side by side on one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from cbsa_torch._core.checks import some_of
from cbsa_torch.cli import runs
from cbsa_torch.cli.options import PageOptions, parse
from cbsa_torch.interpret import ComparedRun, compare
from cbsa_torch.models.counting import count_model
from cbsa_torch.models.shipped import results_folder
from cbsa_torch.train.engine.console import say
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.evaluate import evaluate_split
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.tasks.base import Trained


@dataclass
class _CompareArgs(PageOptions):
    """Write a self-contained page that shows several runs on the same images side by side."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Two or more run folders, or names of weights that come with the package, trained on the same data."""
    output: str = "runs/comparison"
    """The folder of the page, its numbers and its figures."""
    shown: int = 4
    """How many test images get attention maps."""


def run(args: list[str]) -> None:
    """Show several runs side by side: every figure of their reports, on the same images."""
    options = parse(_CompareArgs, args, "compare")
    say(f"comparison: {compare_runs(options.runs, options.output, **options.counts())}")


def compare_runs(
    checkpoints: Sequence[str],
    output: str | Path,
    *,
    images: int = 256,
    shown: int = 4,
    robustness_images: int = 128,
) -> Path:
    """Evaluate runs on their test split and write ``compare.html`` into ``output``; returns its path.

    Args:
        checkpoints: two or more run folders, of the same data and classes.
        output: a folder.
        images, shown, robustness_images: as for a report.
    """
    if len(checkpoints) < 2:
        raise ConfigError(f"compare needs two runs or more, got {len(checkpoints)}: cbsa compare RUN RUN ...")
    opened: dict[str, Trained] = {}
    known: dict[Path, str] = {}
    for checkpoint in checkpoints:
        trained = runs.open_run(checkpoint)
        if not trained.task.one_class_per_image:
            raise ConfigError(
                f"{trained.path} is of the task {trained.config.task!r}, and compare is for classifiers; cbsa "
                "report knows both"
            )
        first = known.setdefault(trained.path.resolve(), checkpoint)
        if checkpoint in opened or first != checkpoint:
            raise ConfigError(f"a run is given twice: {first} and {checkpoint}; name each once")
        opened[checkpoint] = trained
    _check_same_data(opened)
    names = _short_names(checkpoints)
    compared = []
    for checkpoint, trained in opened.items():
        folder = results_folder(trained.path)
        skipped = folder / "eval_report.skipped.txt"
        opened_split = trained.task.open_split(trained.spec.mode, trained.class_names, None, skipped)
        split = opened_split.name
        inputs, labels = trained.task.sample(opened_split.dataset, trained.spec, images)
        output_file = folder / f"eval_{split}.json"
        evaluation = evaluate_split(trained.fused(), opened_split, skipped, output=output_file)
        titles = runs.titles(trained, inputs[:shown], labels[:shown])
        compared.append(
            ComparedRun(
                name=names[checkpoint],
                model=trained.model,
                images=inputs,
                labels=labels,
                pictures=runs.pictures(trained, inputs[:shown], titles),
                architecture=trained.info["model"],
                flops=count_model(trained.model, trained.spec.input_size).total.counts.flops,
                accuracy=evaluation.score,
                history=RunFolder(trained.path.parent).read_metrics(print),
            )
        )
    reference = opened[checkpoints[0]]
    title = f"{len(compared)} models on {reference.config.data.name}, {split} split"
    return compare(
        compared,
        output,
        title=title,
        score=reference.task.score,
        score_title=reference.task.score_title,
        robustness_images=robustness_images,
    ).page


def _check_same_data(opened: dict[str, Trained]) -> None:
    (first_name, first), *others = opened.items()
    for name, other in others:
        for key in ("name", "root", "val_fraction"):
            one, two = getattr(first.config.data, key), getattr(other.config.data, key)
            if one != two:
                raise ConfigError(
                    f"{first_name} and {name} were trained on different data: data.{key} is {one} and {two}"
                )
        if first.class_names != other.class_names:
            one, two = some_of(first.class_names), some_of(other.class_names)
            raise ConfigError(f"{first_name} and {name} have different classes: {one}; {two}")


def _short_names(checkpoints: Sequence[str]) -> dict[str, str]:
    """Folder names where they tell runs apart, else what was given."""
    short = [Path(checkpoint).resolve().name for checkpoint in checkpoints]
    return dict(zip(checkpoints, short if len(set(short)) == len(short) else checkpoints, strict=True))
