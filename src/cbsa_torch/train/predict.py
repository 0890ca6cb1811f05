"""Classify image files with a trained checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import create_transform
from torch import Tensor

from cbsa_torch.train.data import InputSpec, read_image_file
from cbsa_torch.train.errors import ConfigError, DataError
from cbsa_torch.train.evaluate import Trained, open_trained


class Prediction(NamedTuple):
    """The most likely classes of one image, or why it could not be read."""

    image: str
    classes: list[str]
    probabilities: list[float]
    error: str | None = None


def read_image(path: str | Path, spec: InputSpec) -> Tensor:
    """Read an image file as the model's input, ``(1, channels, height, width)``."""
    if not Path(path).is_file():
        raise DataError(f"no image at {path}")
    try:
        image = read_image_file(path, spec.mode)
    except DataError as error:
        raise DataError(f"cannot read image {path}: {error}") from error
    return eval_transform(spec)(image)[None]


def eval_transform(spec: InputSpec) -> Any:
    """Resize, centre crop, normalise: what the model was validated with."""
    return create_transform(
        spec.input_size,
        is_training=False,
        mean=spec.mean,
        std=spec.std,
        interpolation=spec.interpolation,
        crop_pct=spec.crop_pct,
    )


@torch.inference_mode()
def predict_images(
    checkpoint: str | Path | Trained, images: Sequence[str | Path], *, top: int = 5, on_bad_image: str = "stop"
) -> list[Prediction]:
    """Classify image files one by one.

    Args:
        checkpoint: a run folder, a ``.safetensors`` file of one, or an opened one.
        images: files.
        top: how many classes to name.
        on_bad_image: "stop" raises DataError; "skip" reports the error in that image's prediction.
    """
    if top < 1:
        raise ConfigError(f"top must be at least 1, got {top}")
    trained = checkpoint if isinstance(checkpoint, Trained) else open_trained(checkpoint)
    device = next(trained.model.parameters()).device
    predictions = []
    for path in images:
        try:
            pixels = read_image(path, trained.spec)
        except DataError as error:
            if on_bad_image == "stop":
                raise
            predictions.append(Prediction(str(path), [], [], str(error)))
            continue
        probabilities = trained.model(pixels.to(device)).softmax(-1)[0]
        best = probabilities.topk(min(top, len(trained.class_names)))
        names = [trained.class_names[i] for i in best.indices.tolist()]
        predictions.append(Prediction(str(path), names, best.values.tolist()))
    return predictions
