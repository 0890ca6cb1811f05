"""Images and masks of a few pixels as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (8, 6)
"""Width and height."""
NAMES = ["sky", "water", "sand"]


def write_image_or_mask(path: Path, values: Sequence[int] | None = None, size: tuple[int, int] = SIZE) -> None:
    """An image, or a mask whose first row begins with values and whose rest is the first of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if values is None:
        pixels = np.random.default_rng(len(path.name)).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    else:
        pixels = np.full(size[::-1], values[0], dtype=np.uint8)
        pixels[0, : len(values)] = values
    Image.fromarray(pixels).save(path)


def write_pairs(root: Path) -> Path:
    """Eight training, three validation and two test pairs of three classes."""
    for split, count in (("train", 8), ("val", 3), ("test", 2)):
        for i in range(count):
            write_image_or_mask(root / split / "images" / f"{split}_{i}.jpg")
            write_image_or_mask(root / split / "masks" / f"{split}_{i}.png", [0, 1, 2])
    (root / "classes.txt").write_text("\n".join(NAMES))
    return root
