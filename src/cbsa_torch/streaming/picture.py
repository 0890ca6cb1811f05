"""Pictures of maps that may be larger than a screen."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from cbsa_torch._core.files import write_atomically

LARGEST = 1024
"""Pixels along the longer side of a picture."""


def draw_map(array: Path, picture: Path) -> None:
    """Draw a map ``(H, h, w)``, averaged over heads, from black (the lowest percent) to white (the highest).

    Maps larger than the picture are averaged over squares of tokens, smaller ones enlarged.
    """
    values = np.load(array, mmap_mode="r")
    _, height, width = values.shape
    side = -(-max(height, width) // LARGEST)
    columns = np.arange(0, width, side)
    strips = []
    for top in range(0, height, side):
        strip = values[:, top : top + side].mean((0, 1), dtype=np.float64)
        strips.append(np.add.reduceat(strip, columns) / np.diff([*columns, width]))
    small = np.stack(strips)
    low, high = np.percentile(small, [1, 99])
    grey = np.clip((small - low) / max(high - low, np.finfo(np.float64).tiny), 0, 1)
    image = Image.fromarray((255 * grey).round().astype(np.uint8))
    larger = max(1, LARGEST // (2 * max(image.size)))
    image = image.resize((image.width * larger, image.height * larger), Image.Resampling.NEAREST)
    buffer = BytesIO()
    image.save(buffer, "PNG")
    write_atomically(picture, buffer.getvalue())
