"""``cbsa predict``: by whatever task the trained model is of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from cbsa_torch._core.files import write_atomically
from cbsa_torch.cli.options import parse
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.evaluate import open_trained, predict_images
from cbsa_torch.train.tasks.base import WindowOptions


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


def run(args: list[str]) -> None:
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
