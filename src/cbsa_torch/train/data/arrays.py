"""Data sets held in memory as arrays: scikit-learn's digits, and those that ``cbsa data fetch`` built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from cbsa_torch._core.checks import nearest
from cbsa_torch.images.decode import MID_GREY
from cbsa_torch.images.errors import DataError
from cbsa_torch.train.data.fetch import DATA_SETS, load

DIGITS_SIZES = {"train": 1257, "val": 180, "test": 360}
"""Sizes of the fixed stratified split (seed 0), whatever the seed of the run."""


class ArrayImages(Dataset[tuple[Any, int]]):
    """Rows of an array as Pillow images.

    Args:
        pixels: (n, height, width) grey or (n, height, width, 3) colour, uint8.
        labels: (n,).
        mode: colour mode of the images, "L" or "RGB".
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, mode: str) -> None:
        self.pixels, self.labels, self.mode = pixels, labels, mode
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.pixels[index]).convert(self.mode)
        return image if self.transform is None else self.transform(image), int(self.labels[index])


def open_digits(mode: str) -> tuple[dict[str, ArrayImages], list[str]]:
    """The splits by name, and the names of the classes."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    labels = digits.target
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    rows = {"train": np.arange(len(pixels))}
    for name in ("test", "val"):
        rows["train"], rows[name] = train_test_split(
            rows["train"], test_size=DIGITS_SIZES[name], stratify=labels[rows["train"]], random_state=0
        )
    splits = {name: ArrayImages(pixels[index], labels[index], mode) for name, index in rows.items()}
    return splits, [str(name) for name in digits.target_names]


def open_fetched(name: str, root: str | Path | None, mode: str) -> tuple[dict[str, ArrayImages], list[str]]:
    """The splits by name, and the names of the classes; ``root`` is the folder of the ``.npz`` file.

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


def write_images(name: str, output: str | Path, root: str | Path | None = None) -> dict[str, int]:
    """Write a data set as files ``OUTPUT/SPLIT/CLASS/NUMBER.png``, as training on a folder reads them.

    Args:
        name: "digits", or a data set that was fetched.
        output: a folder, new or empty.
        root: the folder of the ``.npz`` file of a fetched one.

    Returns:
        The number of images of each split.

    Raises:
        DataError: unknown name, a folder that is not empty, or a data set that was not fetched.
    """
    known, output = ("digits", *DATA_SETS), Path(output)
    if name not in known:
        raise DataError(f"no data set {name!r}{nearest(name, known)} (there are: {', '.join(known)})")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output} is there already: give another folder, or remove it")
    splits, class_names = open_digits("L") if name == "digits" else open_fetched(name, root, "RGB")
    for split, images in splits.items():
        for class_name in class_names:
            (output / split / class_name).mkdir(parents=True, exist_ok=True)
        for i, (pixels, label) in enumerate(zip(images.pixels, images.labels, strict=True)):
            Image.fromarray(pixels).save(output / split / class_names[label] / f"{i:04}.png")
    return {split: len(images) for split, images in splits.items()}


def over_grey(drawings: np.ndarray) -> np.ndarray:
    """Lay drawings (n, height, width, 4) with straight alpha over mid-grey; (n, height, width, 3) uint8."""
    alpha = drawings[..., 3:].astype(np.uint16)
    # the largest value, 255 * 255 + 127, fits
    return ((drawings[..., :3] * alpha + MID_GREY * (255 - alpha) + 127) // 255).astype(np.uint8)
