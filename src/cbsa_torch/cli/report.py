"""``cbsa report``: joins what training knows of a run with what interpretation measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from cbsa_torch.cli import runs
from cbsa_torch.cli.options import PageOptions, parse
from cbsa_torch.interpret import report
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.evaluate import Trained, evaluate_checkpoint
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.tasks.base import task_of
from cbsa_torch.train.tasks.segmentation.config import SegmentationTrainConfig
from cbsa_torch.train.tasks.segmentation.evaluate import evaluate_segmenter


@dataclass
class _ReportArgs(PageOptions):
    """Write a self-contained page about a trained model."""

    files: tyro.conf.Positional[tuple[str, ...]] = ()
    """Image files that get attention maps, too."""
    checkpoint: str = "runs/digits"
    """A run folder."""


def run_report(args: list[str]) -> None:
    """Write a page about a trained model: accuracy, curves, coding rates, attention maps."""
    options = parse(_ReportArgs, args, "report")
    score, page = report_run(options.checkpoint, options.files, **options.counts())
    print(f"test {task_of(runs.open_run(options.checkpoint).config).score_title}: {score:.4f}")
    print(f"report: {page}")


def report_run(
    checkpoint: str | Path,
    files: Sequence[str] = (),
    *,
    images: int = 256,
    shown: int = 6,
    robustness_images: int = 128,
) -> tuple[float, Path]:
    """Evaluate a run's kept weights on its test split (or, without one, on validation) and write its page.

    Args:
        checkpoint: a run folder.
        files: images that get attention maps besides those of the split.
        images: how many images measure the coding rates.
        shown: how many of them get attention maps.
        robustness_images: how many of them the robustness curve uses; 0 leaves it out.

    Returns:
        The accuracy (of a segmenter the mean IoU) and the path of ``report.html``.
    """
    for file in files:
        if Path(file).is_dir():  # cbsa compare takes runs by place, so it is easily confused
            raise ConfigError(f"{file} is a folder, not an image; a run is named by --checkpoint {file}")
    trained = runs.open_run(checkpoint)
    further = runs.read_pictures(trained, files)  # a bad file stops before anything takes time
    folder = RunFolder(trained.path.parent)
    split = runs.evaluated_split(trained)
    measured = _evaluate(trained, split)
    inputs, pictures, labels = runs.sample_images(trained, split, images)
    written = report(
        trained.model,
        inputs,
        pictures,
        folder.path,
        title=f"{trained.info['model']} on {trained.config.data.name}",
        facts=runs.facts(trained, folder),
        history=folder.read_metrics(print),
        evaluation={**measured, "split": split, "class_names": trained.class_names},
        image_titles=runs.titles(trained, inputs[:shown], labels[:shown]),
        labels=labels or None,
        further=further,
        shown=shown,
        robustness_images=robustness_images,
    )
    return measured["miou" if "miou" in measured else "top1"], written.page


def _evaluate(trained: Trained, split: str) -> dict[str, Any]:
    """What the page says of a split: top1 or miou, loss, images, confusion."""
    if not isinstance(trained.config, SegmentationTrainConfig):
        return evaluate_checkpoint(trained.path, split=split)._asdict()
    result = evaluate_segmenter(trained.path, split=split)
    return {
        "miou": result.score,
        "loss": result.loss,
        "images": result.images,
        "confusion": result.scores.confusion,
    }
