"""The embedded data set: scikit-learn's digits."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

SIZES = {"train": 1257, "val": 180, "test": 360}
"""Sizes of the fixed stratified split (seed 0), whatever the seed of the run."""


class DigitsDataset(Dataset[tuple[Any, int]]):
    """scikit-learn's digits: 8x8 grey scans as Pillow images."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, mode: str) -> None:
        self.pixels, self.labels, self.mode = pixels, labels, mode
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.pixels[index]).convert(self.mode)
        return image if self.transform is None else self.transform(image), int(self.labels[index])


def open_digits(mode: str) -> tuple[dict[str, DigitsDataset], list[str]]:
    """The splits by name, and the names of the classes."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    labels = digits.target
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    rows = {"train": np.arange(len(pixels))}
    for name in ("test", "val"):
        rows["train"], rows[name] = train_test_split(
            rows["train"], test_size=SIZES[name], stratify=labels[rows["train"]], random_state=0
        )
    splits = {name: DigitsDataset(pixels[index], labels[index], mode) for name, index in rows.items()}
    return splits, [str(name) for name in digits.target_names]
