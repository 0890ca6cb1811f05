"""``cbsa predict``: by whatever task the trained model is of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import tyro

from cbsa_torch._core.files import write_atomically
from cbsa_torch.cli.options import OtherOptions, SizeOptions, open_on, parse
from cbsa_torch.cli.streamed import StreamOptions
from cbsa_torch.cli.streamed import predict as predict_streamed
from cbsa_torch.train.engine.console import number_table, print_table, say
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.tasks.base import Prediction, PredictOptions, Trained


@dataclass
class _PredictArgs(StreamOptions, OtherOptions, SizeOptions, PredictOptions):
    """Classify or segment image files, or classify slides."""

    images: tyro.conf.Positional[tuple[str, ...]] = ()
    """Image files; of a model of slides, their files of features (.h5, .pt)."""
    checkpoint: str = "runs/digits"
    """A run folder, a file of weights, or the name of weights that come with the package (`cbsa list`)."""
    root: str | None = None
    """The folder of data that says the classes of weights that no run wrote (a released checkpoint, a plain
    state dict); in alphabetical order they are its outputs."""
    data: str | None = None
    """What lies there. Default: "folder"."""
    output: str | None = None
    """Also write the predictions to this JSON file."""


def run(args: list[str]) -> None:
    """Classify or segment image files, or classify slides."""
    options = parse(_PredictArgs, args, "predict")
    if not options.images and options.stream is None:
        raise ConfigError("no images given; name some: cbsa predict --checkpoint RUN IMAGE ...")
    if options.images and options.stream is not None:
        raise ConfigError(f"give image files or --stream, which is one image, not both: {options.images[0]}")
    trained = open_on(options.checkpoint, options)
    if "config" in trained.info and (options.root, options.data) != (None, None):
        raise ConfigError(f"{options.checkpoint} says its classes: leave out --root and --data")
    if options.stream is not None:
        if options.changes():
            raise ConfigError(
                "--native, --max-tokens and --max-image-tokens are not for --stream, which takes the image as "
                "it is"
            )
        _tell(trained, [predict_streamed(trained.fused(), options.stream, options)], options)
        return
    trained = options.applied_to(trained)
    if not trained.task.takes_images:
        _predict_slides(trained, options)
        return
    _tell(trained, trained.task.predict(trained.fused(), options.images, options), options)


def _predict_slides(trained: Trained, options: _PredictArgs) -> None:
    """Also the table and the maps of slides."""
    try:
        from cbsa_torch.cli import slides
    except ImportError as error:
        raise ConfigError(f"maps of slides: {error}") from None
    folder = Path(options.maps or slides.FOLDER)
    planned = slides.plan_files(options.images, folder, options.overwrite)
    predictions = trained.task.predict(trained.fused(), options.images, options)
    _tell(trained, predictions, options)
    table = slides.write_table(cast(Any, predictions), trained.class_names, folder)
    for prediction in predictions:
        if prediction.error is None:
            name, share = prediction.class_shares()[0]
            title = f"{Path(prediction.image).stem}: {name} ({share:.2f})"
            slides.write_map(trained, prediction.image, planned[prediction.image], title)
    say(f"probabilities: {table}; maps of attention: {folder}")


def _tell(trained: Trained, predictions: Sequence[Prediction], options: _PredictArgs) -> None:
    """Print the predictions and, where asked for, write them as JSON."""
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
