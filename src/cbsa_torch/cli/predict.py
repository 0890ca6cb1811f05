"""``cbsa predict``: by whatever task the trained model is of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from cbsa_torch._core.files import write_atomically
from cbsa_torch.cli.options import OtherOptions, open_on, parse
from cbsa_torch.cli.streamed import StreamOptions
from cbsa_torch.cli.streamed import predict as predict_streamed
from cbsa_torch.train.engine.console import number_table, print_table, say
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.tasks.base import Prediction, PredictOptions


@dataclass
class _PredictArgs(StreamOptions, OtherOptions, PredictOptions):
    """Classify or segment image files."""

    images: tyro.conf.Positional[tuple[str, ...]] = ()
    """Image files."""
    checkpoint: str = "runs/digits"
    """A run folder or a file of weights."""
    root: str | None = None
    """The folder of data that says the classes of weights that no run wrote (a released checkpoint, a plain
    state dict); in alphabetical order they are its outputs."""
    data: str | None = None
    """What lies there. Default: "folder"."""
    output: str | None = None
    """Also write the predictions to this JSON file."""


def run(args: list[str]) -> None:
    """Classify or segment image files."""
    options = parse(_PredictArgs, args, "predict")
    if not options.images and options.stream is None:
        raise ConfigError("no images given: cbsa predict --checkpoint RUN IMAGE ...")
    if options.images and options.stream is not None:
        raise ConfigError(f"give image files or --stream, which is one image, not both: {options.images[0]}")
    trained = open_on(options.checkpoint, options)
    if "config" in trained.info and (options.root, options.data) != (None, None):
        raise ConfigError(f"{options.checkpoint} says its classes: leave out --root and --data")
    trained = trained.fused()
    if options.stream is not None:
        predictions: Sequence[Prediction] = [predict_streamed(trained, options.stream, options)]
    else:
        predictions = trained.task.predict(trained, options.images, options)
    table = number_table("image", "class", trained.task.share_title, left=2)
    for prediction in predictions:
        if prediction.error is not None:
            table.add_row(prediction.image, prediction.error, "")
        for i, (name, value) in enumerate(prediction.class_shares()):
            table.add_row(prediction.image if i == 0 else "", name, f"{value:.4f}")
    print_table(table)
    if options.output is not None:
        record = [prediction._asdict() for prediction in predictions]
        write_atomically(Path(options.output), json.dumps(record, indent=2).encode())
        say(f"predictions: {options.output}")
