"""`cbsa eval` and `cbsa predict`: of whatever task the trained model is."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from cbsa_torch._core.files import write_atomically
from cbsa_torch.cli.options import at_least, parse
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.evaluate import evaluate_checkpoint, open_trained, predict_images
from cbsa_torch.train.tasks.base import WindowOptions


@dataclass
class _EvalArgs(WindowOptions):
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
    changes: dict[str, Any] = {"root": options.root, "name": options.data}
    changes["max_bad_images"] = options.max_bad_images
    changes = {key: value for key, value in changes.items() if value is not None}
    if options.max_bad_images is not None:
        at_least(0, max_bad_images=options.max_bad_images)
    if options.batch_size is not None:
        at_least(1, batch_size=options.batch_size)
    trained = open_trained(options.checkpoint)
    if options.root is not None and trained.task.data_name_elsewhere is not None:
        changes.setdefault("name", trained.task.data_name_elsewhere)
    data: Any = trained.config.data  # of the task
    result = evaluate_checkpoint(
        trained,
        split=options.split,
        data=dataclasses.replace(data, **changes),
        batch_size=options.batch_size,
        windows=options,
        output=options.output,
    )
    rows = result.class_table()
    if rows:
        table = Table(rows[0][0], box=None, pad_edge=False)
        for heading in rows[0][1:]:
            table.add_column(heading, justify="right")
        for row in rows[1:]:
            table.add_row(*row)
        Console().print(table)
    print(f"{options.split} {result.summary()}")


@dataclass
class _PredictArgs(WindowOptions):
    """Classify or segment image files."""

    images: tyro.conf.Positional[tuple[str, ...]] = ()
    """Image files."""
    checkpoint: str = "runs/digits"
    """A run folder or a .safetensors file of one."""
    top: int = 5
    """Classifiers: how many classes to name."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What to do about an unreadable image."""
    masks: str | None = None
    """Segmenters: the folder for NAME_mask.png (coloured, with a legend) and NAME_labels.png (numbers).
    Default: predicted_masks."""
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
    predictions = predict_images(
        trained,
        options.images,
        top=options.top,
        on_bad_image=options.on_bad_image,
        masks=options.masks,
        overwrite=options.overwrite,
        windows=options,
    )
    table = Table("image", "class", trained.task.share_title)
    for prediction in predictions:
        if prediction.error is not None:
            table.add_row(prediction.image, prediction.error, "")
        for i, (name, value) in enumerate(prediction.class_shares()):
            table.add_row(prediction.image if i == 0 else "", name, f"{value:.4f}")
    Console().print(table)
    if options.output is not None:
        record = [prediction._asdict() for prediction in predictions]
        write_atomically(Path(options.output), json.dumps(record, indent=2).encode())
        print(f"predictions: {options.output}")
