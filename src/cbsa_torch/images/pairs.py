"""Pairs of an image file and the file of its mask."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from cbsa_torch.images.errors import DataError, UnreadableImageError
from cbsa_torch.images.folders import image_files


class Pair(NamedTuple):
    """An image and its mask; whether the files are there shows when they are read."""

    image: Path
    mask: Path


def pair_folders(images: Path, masks: Path, ends: tuple[str, str] | None = None) -> list[Pair]:
    """Pair the files of two folders whose paths within them are equal but for the ending.

    Sorted by these paths. To an image without a mask, and to a mask without an image, the name that the other
    file would have is given.

    Args:
        images, masks: the folders.
        ends: endings of the images and of the masks; other files are passed over. Default: all image files,
            each without its suffix.

    Raises:
        DataError: not a folder, no files at all, or two files of one name but for the suffix.
    """
    found = [_by_key(folder, ends and ends[i]) for i, folder in enumerate((images, masks))]
    image_end, mask_end = ends or (".jpg", ".png")
    pairs = [
        Pair(
            found[0].get(key, images / f"{key}{image_end}"),
            found[1].get(key, masks / f"{key}{mask_end}"),
        )
        for key in sorted({*found[0], *found[1]})
    ]
    if not pairs:
        raise DataError(f"no images found in {images}")
    return pairs


def check_size(pair: Pair, image: Image.Image, mask: np.ndarray) -> None:
    """Refuse a mask (height, width) of another size than its image; raises UnreadableImageError."""
    height, width = mask.shape
    if (width, height) != image.size:
        raise UnreadableImageError(
            f"the mask is {width}x{height} pixels (width x height), its image {pair.image} "
            f"{image.size[0]}x{image.size[1]}"
        )


def _by_key(folder: Path, end: str | None) -> dict[str, Path]:
    """Image files by their path within the folder without the ending."""
    found: dict[str, Path] = {}
    for path in image_files(folder):
        if not path.name.endswith(end or ""):
            continue
        key = path.relative_to(folder).as_posix().removesuffix(end or path.suffix)
        if key in found:
            raise DataError(f"{found[key]} and {path} differ in their ending alone: which one counts?")
        found[key] = path
    return found
