"""`cbsa eval` and `cbsa predict`: of a classifier or of a segmenter, as the checkpoint says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from cbsa_torch._core.files import write_atomically
from cbsa_torch.cli.options import at_least, parse
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.evaluate import Trained, classifier_config, evaluate_checkpoint, open_trained
from cbsa_torch.train.predict import predict_images
from cbsa_torch.train.tasks.segmentation.config import SegmentationTrainConfig
from cbsa_torch.train.tasks.segmentation.evaluate import evaluate_segmenter, segmenter_config, trained_windows
from cbsa_torch.train.tasks.segmentation.measure import Windows
from cbsa_torch.train.tasks.segmentation.predict import predict_masks


@dataclass
class _WindowOptions:
    """How a segmenter sees whole images; classifiers know none of it."""

    window: int | None = None
    """Segmenters: side of the windows in pixels. Default: as in validation."""
    stride: int | None = None
    """Segmenters: pixels from one window to the next. Default: as in validation, or the window."""
    scales: tuple[float, ...] = (1.0,)
    """Segmenters: resize images by these factors and average, e.g. 0.5 0.75 1.0 1.25 1.5 1.75."""
    flip: bool = False
    """Segmenters: average with the mirrored image, too."""

    def windows(self, trained: Trained) -> Windows:
        """For a trained segmenter."""
        return trained_windows(segmenter_config(trained), self.window, self.stride, self.scales, self.flip)

    def refuse(self) -> None:
        """Raise ConfigError if one was given for a classifier."""
        given = [
            option.name
            for option in dataclasses.fields(_WindowOptions)
            if getattr(self, option.name) != option.default
        ]
        if given:
            raise ConfigError(f"--{given[0]} is for segmenters; this checkpoint is a classifier")


@dataclass
class _EvalArgs(_WindowOptions):
    """Evaluate a trained model; writes eval_<split>.json beside the checkpoint."""

    checkpoint: str = "runs/digits"
    """A run folder or a .safetensors file of one."""
    split: Literal["train", "val", "test"] = "test"
    """The images to evaluate on."""
    root: str | None = None
    """Evaluate on the data in this folder instead of where the training data lay."""
    data: str | None = None
    """What lies there. Default: for classifiers "folder"; for segmenters what was trained on, e.g. "ade20k";
    "folder" is for images and masks of your own."""
    max_bad_images: int | None = None
    """Unreadable images that are left out, counted and listed; one more stops. Default: as in training."""
    batch_size: int | None = None
    """Images (of segmenters: windows) per forward pass; changes memory and time, not the result. Default: 256,
    or as in validation."""
    output: str | None = None
    """The JSON file. Default: eval_<split>.json beside the checkpoint (eval_<split>_multi_scale.json)."""


def run_eval(args: list[str]) -> None:
    """Evaluate a trained model."""
    options = parse(_EvalArgs, args, "eval")
    changes: dict[str, Any] = {}
    if options.root is not None:
        changes["root"] = options.root
    if options.data is not None:
        changes["name"] = options.data
    if options.max_bad_images is not None:
        at_least(0, max_bad_images=options.max_bad_images)
        changes["max_bad_images"] = options.max_bad_images
    if options.batch_size is not None:
        at_least(1, batch_size=options.batch_size)
    trained = open_trained(options.checkpoint)
    if isinstance(trained.config, SegmentationTrainConfig):
        _eval_segmenter(options, trained, changes)
        return
    options.refuse()
    if options.root is not None:
        changes.setdefault("name", "folder")
    result = evaluate_checkpoint(
        options.checkpoint,
        split=options.split,
        data=dataclasses.replace(classifier_config(trained).data, **changes),
        batch_size=256 if options.batch_size is None else options.batch_size,
        output=options.output,
    )
    top5 = "" if result.top5 is None else f"  top-5: {result.top5:.4f}"
    print(
        f"{options.split} accuracy: {result.top1:.4f}{top5}  loss: {result.loss:.4f}  images: {result.images}"
    )


def _eval_segmenter(options: _EvalArgs, trained: Trained, changes: dict[str, Any]) -> None:
    windows = options.windows(trained)
    if options.batch_size is not None:
        windows = windows._replace(batch=options.batch_size)
    result = evaluate_segmenter(
        options.checkpoint,
        split=options.split,
        data=dataclasses.replace(segmenter_config(trained).data, **changes),
        windows=windows,
        output=options.output,
    )
    table = Table("class", "IoU", "accuracy", "pixels", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, one in result.scores.classes.items():
        table.add_row(name, _percent(one.iou), _percent(one.accuracy), f"{one.pixels:,}")
    Console().print(table)
    scores = result.scores
    print(
        f"{options.split} mean IoU: {scores.miou:.4f}  pixel accuracy: {scores.pixel_accuracy:.4f}  "
        f"mean accuracy: {scores.mean_accuracy:.4f}  loss: {result.loss:.4f}  images: {result.images}"
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


@dataclass
class _PredictArgs(_WindowOptions):
    """Classify or segment image files."""

    images: tyro.conf.Positional[tuple[str, ...]] = ()
    """Image files."""
    checkpoint: str = "runs/digits"
    """A run folder or a .safetensors file of one."""
    top: int = 5
    """Classifiers: how many classes to name."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What to do about an unreadable image."""
    masks: str = "predicted_masks"
    """Segmenters: the folder for NAME_mask.png (coloured, with a legend) and NAME_labels.png (numbers)."""
    overwrite: bool = False
    """Segmenters: replace files of these names."""
    output: str | None = None
    """Also write the predictions to this JSON file."""


def run_predict(args: list[str]) -> None:
    """Classify or segment image files."""
    options = parse(_PredictArgs, args, "predict")
    if not options.images:
        raise ConfigError("no images given: cbsa predict --checkpoint RUN IMAGE ...")
    trained = open_trained(options.checkpoint)
    if isinstance(trained.config, SegmentationTrainConfig):
        masks = predict_masks(
            trained,
            options.images,
            options.masks,
            windows=options.windows(trained),
            on_bad_image=options.on_bad_image,
            overwrite=options.overwrite,
        )
        rows = [(item.image, list(item.shares.items()), item.error) for item in masks]
        _show(rows, "share of pixels", masks, options.output)
        print(f"masks: {options.masks}")
        return
    options.refuse()
    if options.overwrite:
        raise ConfigError("--overwrite is for segmenters; this checkpoint is a classifier")
    found = predict_images(trained, options.images, top=options.top, on_bad_image=options.on_bad_image)
    classes = [
        (item.image, list(zip(item.classes, item.probabilities, strict=True)), item.error) for item in found
    ]
    _show(classes, "probability", found, options.output)


def _show(
    rows: Sequence[tuple[str, list[tuple[str, float]], str | None]],
    number: str,
    records: Sequence[Any],
    output: str | None,
) -> None:
    """Print images, classes and a number each, and write the records where asked for."""
    table = Table("image", "class", number)
    for image, classes, error in rows:
        if error is not None:
            table.add_row(image, error, "")
        for i, (name, value) in enumerate(classes):
            table.add_row(image if i == 0 else "", name, f"{value:.4f}")
    Console().print(table)
    if output is not None:
        write_atomically(Path(output), json.dumps([item._asdict() for item in records], indent=2).encode())
        print(f"predictions: {output}")
