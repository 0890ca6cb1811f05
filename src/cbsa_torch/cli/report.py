"""``cbsa report``: joins what training knows of a run with what interpretation measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import tyro

from cbsa_torch.cli import runs
from cbsa_torch.cli.options import OtherOptions, PageOptions, parse
from cbsa_torch.interpret import report
from cbsa_torch.models.shipped import results_folder
from cbsa_torch.train.engine.console import say
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.evaluate import evaluate_split
from cbsa_torch.train.run.folder import RunFolder


@dataclass
class _ReportArgs(OtherOptions, PageOptions):
    """Write a self-contained page about a trained model."""

    files: tyro.conf.Positional[tuple[str, ...]] = ()
    """Image files that get attention maps, too."""
    checkpoint: str = "runs/digits"
    """A run folder, or a file of weights, which the page is then written beside; or the name of weights that
    come with the package (`cbsa list`), whose page goes into runs/NAME."""


def run(args: list[str]) -> None:
    """Write a page about a trained model: accuracy, curves, coding rates, attention maps."""
    options = parse(_ReportArgs, args, "report")
    result = report_run(options.checkpoint, options.files, options, **options.counts())
    say(f"{result.split} {result.score_title}: {result.score:.4f}")
    say(f"report: {result.page}")


class RunReport(NamedTuple):
    """The outcome of :func:`report_run`."""

    split: str
    """"test", or "val" where there is no test split."""
    score_title: str
    """What the score is called: "accuracy", or "mean IoU" of a segmenter."""
    score: float
    page: Path
    """``report.html``."""


def report_run(
    checkpoint: str | Path,
    files: Sequence[str] = (),
    other: OtherOptions | None = None,
    *,
    images: int = 256,
    shown: int = 6,
    robustness_images: int = 128,
) -> RunReport:
    """Evaluate a run's weights on its test split (or, without one, on validation) and write its page.

    Args:
        checkpoint: a run folder, a file of weights, or the name of weights that come with the package.
        files: images that get attention maps besides those of the split.
        other: the model that a plain state dict is of, and other data than the run's.
        images: how many images measure the coding rates.
        shown: how many of them get attention maps.
        robustness_images: how many of them the robustness curve uses; 0 leaves it out.
    """
    for file in files:
        if Path(file).is_dir():  # cbsa compare takes runs by place, so it is easily confused
            raise ConfigError(f"{file} is a folder, not an image; a run is named by --checkpoint {file}")
    trained = runs.open_run(checkpoint, other)
    given, given_titles = runs.read_inputs(trained, files)  # a bad file stops before anything takes time
    folder, output = RunFolder(trained.path.parent), results_folder(trained.path)
    skipped = output / "eval_report.skipped.txt"
    opened = trained.task.open_split(trained.spec.mode, trained.class_names, None, skipped)
    split = opened.name
    inputs, labels = trained.task.sample(opened.dataset, trained.spec, images)
    result = evaluate_split(trained.fused(), opened, skipped, output=output / f"eval_{split}.json")
    titles = [*given_titles, *runs.titles(trained, inputs[:shown], labels[:shown])]
    written = report(
        trained.model,
        inputs,
        output,
        title=f"{trained.info['model']} on {trained.config.data.name}",
        facts=runs.facts(trained, folder),
        history=folder.read_metrics(print),
        evaluation={
            **result.record(),
            "score": result.score,
            "split": split,
            "class_names": trained.class_names,
        },
        score=trained.task.score,
        score_title=trained.task.score_title,
        pictures=runs.pictures(trained, torch.cat([given, inputs[:shown]]), titles),
        labels=labels or None,
        robustness_images=robustness_images,
    )
    return RunReport(split, trained.task.score_title, result.score, written.page)
