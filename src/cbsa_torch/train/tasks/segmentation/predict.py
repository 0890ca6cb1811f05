"""Segment image files with a trained checkpoint."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from cbsa_torch._core.checks import check_choice
from cbsa_torch._core.files import write_atomically
from cbsa_torch.train.data import read_image_file
from cbsa_torch.train.errors import ConfigError, DataError
from cbsa_torch.train.evaluate import Trained, open_trained
from cbsa_torch.train.tasks.segmentation.colours import write_coloured_mask
from cbsa_torch.train.tasks.segmentation.evaluate import segmenter_config, trained_windows
from cbsa_torch.train.tasks.segmentation.measure import Windows
from cbsa_torch.train.tasks.segmentation.transforms import evaluation_transform


class MaskPrediction(NamedTuple):
    """The masks of one image, or why it could not be read."""

    image: str
    shares: dict[str, float]
    """Share of the pixels of each class that occurs, the largest first."""
    mask: str | None = None
    """A picture: the image, the coloured mask, and a legend."""
    labels: str | None = None
    """A grey PNG of the image's size whose values are the labels; 16 bits from 257 classes on."""
    error: str | None = None


def predict_masks(
    checkpoint: str | Path | Trained,
    images: Sequence[str | Path],
    folder: str | Path,
    *,
    windows: Windows | None = None,
    on_bad_image: Literal["stop", "skip"] = "stop",
    overwrite: bool = False,
) -> list[MaskPrediction]:
    """Segment image files of any size, one by one, and write ``NAME_mask.png`` and ``NAME_labels.png`` of each.

    Args:
        checkpoint: a run folder, a ``.safetensors`` file of one, or an opened one.
        images: files; their names without suffix must differ.
        folder: where the masks are written; created if need be.
        windows: how images are seen. Default: as in validation.
        on_bad_image: "stop" raises DataError; "skip" reports the error in that image's prediction.
        overwrite: replace files of these names, which may be somebody's masks.

    Raises:
        ConfigError: two images of one name, files that are there already, a checkpoint that is no segmenter.
            Nothing was written then.
    """
    check_choice("on_bad_image", on_bad_image, ("stop", "skip"))
    trained = checkpoint if isinstance(checkpoint, Trained) else open_trained(checkpoint)
    windows = trained_windows(segmenter_config(trained)) if windows is None else windows
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder, where masks could be written")
    taken: dict[str, Path] = {}
    for path in map(Path, images):
        other = taken.setdefault(path.stem, path)
        if other is not path:
            raise ConfigError(f"{other} and {path} would both be written as {path.stem}_mask.png in {folder}")
    present = [path for stem in taken for path in _targets(folder, stem) if path.exists()]
    if present and not overwrite:
        raise ConfigError(f"{present[0]} is there already; choose another folder (--masks), or --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    predictions = []
    for path in taken.values():
        try:
            predictions.append(_predict(trained, path, folder, windows))
        except DataError as error:
            if on_bad_image == "stop":
                raise
            predictions.append(MaskPrediction(str(path), {}, error=str(error)))
    return predictions


def _targets(folder: Path, stem: str) -> tuple[Path, Path]:
    """The files of an image's coloured mask and of its labels."""
    return folder / f"{stem}_mask.png", folder / f"{stem}_labels.png"


def _predict(trained: Trained, path: Path, folder: Path, windows: Windows) -> MaskPrediction:
    if not path.is_file():
        raise DataError(f"no image at {path}")
    try:
        image = read_image_file(path, trained.spec.mode)
    except DataError as error:
        raise DataError(f"cannot read image {path}: {error}") from error
    names = trained.class_names
    blank = np.zeros((image.size[1], image.size[0]), dtype=np.int64)
    pixels, _ = evaluation_transform(trained.spec.mean, trained.spec.std)(image, blank)
    device = next(trained.model.parameters()).device
    with torch.inference_mode():
        labels = windows.logits(trained.model, pixels.to(device)).argmax(0).cpu().numpy()
    mask, raw = _targets(folder, path.stem)
    write_coloured_mask(image, labels, names, mask)
    buffer = io.BytesIO()
    Image.fromarray(labels.astype(np.uint8 if len(names) <= 256 else np.uint16)).save(buffer, "PNG")
    write_atomically(raw, buffer.getvalue())
    values, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    shares = {names[int(values[i])]: float(counts[i] / labels.size) for i in order}
    return MaskPrediction(str(path), shares, str(mask), str(raw))
