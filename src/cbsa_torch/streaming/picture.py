"""Pictures of maps that may be larger than a screen."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cbsa_torch._core.files import write_atomically

LARGEST = 1024
"""Pixels along the longer side of a picture."""
PART = 1 << 20
"""Tokens that are drawn at once."""


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
    _write(small, picture)


def draw_places(array: Path, coords: np.ndarray[Any, Any], picture: Path) -> None:
    """Draw a map ``(H, N)`` of tokens at ``(N, 2)`` x and y, averaged over heads and over those of a pixel.

    y points down. Where there is no token the picture is black.
    """
    values = np.load(array, mmap_mode="r")
    low = coords.min(0)
    reach = np.maximum((coords.max(0) - low).max(), np.finfo(np.float64).tiny).astype(np.float64)
    # about as many pixels as tokens, if they fill their box
    side = min(LARGEST, max(1, round(len(coords) ** 0.5)))
    sums, counts = np.zeros(side * side), np.zeros(side * side, np.int64)
    for first in range(0, len(coords), PART):
        part = slice(first, first + PART)
        x, y = np.minimum((coords[part] - low) / reach * side, side - 1).astype(np.int64).T
        sums += np.bincount(y * side + x, values[:, part].mean(0, dtype=np.float64), side * side)
        counts += np.bincount(y * side + x, minlength=side * side)
    there = (counts > 0).reshape(side, side)
    means = (sums / np.maximum(counts, 1)).reshape(side, side)
    rows, columns = there.any(1).nonzero()[0], there.any(0).nonzero()[0]
    box = slice(0, rows[-1] + 1), slice(0, columns[-1] + 1)
    _write(means[box], picture, there[box])


def _write(values: np.ndarray[Any, Any], picture: Path, there: np.ndarray[Any, Any] | None = None) -> None:
    """In grey, from black (the lowest percent) to white (the highest), black where nothing is there, or NaN."""
    there = np.isfinite(values) if there is None else there & np.isfinite(values)
    low, high = np.percentile(values[there], [1, 99]) if there.any() else (0.0, 1.0)
    grey = np.clip((values - low) / max(high - low, np.finfo(np.float64).tiny), 0, 1)
    grey = np.where(there, grey, 0)
    image = Image.fromarray((255 * grey).round().astype(np.uint8))
    larger = max(1, LARGEST // (2 * max(image.size)))
    image = image.resize((image.width * larger, image.height * larger), Image.Resampling.NEAREST)
    buffer = BytesIO()
    image.save(buffer, "PNG")
    write_atomically(picture, buffer.getvalue())
