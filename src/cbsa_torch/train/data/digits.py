"""The embedded data set: scikit-learn's digits."""

from __future__ import annotations

import numpy as np

from cbsa_torch.train.data.arrays import ArrayImages

SIZES = {"train": 1257, "val": 180, "test": 360}
"""Sizes of the fixed stratified split (seed 0), whatever the seed of the run."""


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
            rows["train"], test_size=SIZES[name], stratify=labels[rows["train"]], random_state=0
        )
    splits = {name: ArrayImages(pixels[index], labels[index], mode) for name, index in rows.items()}
    return splits, [str(name) for name in digits.target_names]
