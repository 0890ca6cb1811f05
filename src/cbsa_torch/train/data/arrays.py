"""Images that lie in memory as one array."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset


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
