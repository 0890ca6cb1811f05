"""The data sets that ``cbsa data fetch`` built, as splits of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cbsa_torch.train.data.arrays import ArrayImages
from cbsa_torch.train.data.fetch import load

MID_GREY = 128
"""Behind the emoji, which are drawn on nothing."""


def open_fetched(name: str, root: str | Path | None, mode: str) -> tuple[dict[str, ArrayImages], list[str]]:
    """The splits by name, and the names of the classes; ``root`` is the folder of the archive.

    Raises:
        DataError: the data set was not fetched, or its file is damaged.
    """
    arrays = load(name, root)
    if name == "animals28":
        splits = {s: (arrays[f"{s}_x"], arrays[f"{s}_y"]) for s in ("train", "val", "test")}
        class_names = arrays["class_names"]
    else:  # emoji64: an emoji is two images, one by each vendor, in the same split
        pixels = np.concatenate([over_grey(arrays["google"]), over_grey(arrays["twitter"])])
        labels, part = np.tile(arrays["label"], 2), np.tile(arrays["split"], 2)
        splits = {str(s): (pixels[part == i], labels[part == i]) for i, s in enumerate(arrays["split_names"])}
        class_names = arrays["category_names"]
    opened = {s: ArrayImages(pixels, labels, mode) for s, (pixels, labels) in splits.items()}
    return opened, [str(class_name) for class_name in class_names]


def over_grey(drawings: np.ndarray) -> np.ndarray:
    """Lay drawings (n, height, width, 4) with straight alpha over mid-grey; (n, height, width, 3) uint8."""
    alpha = drawings[..., 3:].astype(np.uint16)
    # the largest value, 255 * 255 + 127, fits
    return ((drawings[..., :3] * alpha + MID_GREY * (255 - alpha) + 127) // 255).astype(np.uint8)
