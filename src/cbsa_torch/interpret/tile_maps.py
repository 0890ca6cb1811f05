"""A map of values of tiles at their places, such as the attention of a class token over a slide."""

from __future__ import annotations

import math

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from cbsa_torch.interpret import _style

MOST_CELLS = 2000
"""Cells of a map along its longest side."""
ROUNDED = 0.01
"""What coordinates may be too small by, in tiles: those of a lattice are often rounded down to pixels."""


def coordinate_map(
    coords: Tensor, values: Tensor, tile_size: float | None = None, *, title: str = "", label: str = ""
) -> Figure:
    """Values of tiles at their places, such as the attention of a class token over a slide.

    Tiles are squares of their size; where several share a place, their mean is shown, and where there is none,
    nothing. Colours go from the 1st to the 99th percentile of the values.

    Args:
        coords: ``(N, 2)`` x and y of the tiles' upper left corners; y points down.
        values: ``(N,)``.
        tile_size: side of a tile in the unit of the coordinates. Default: the median distance from a tile to
            its nearest neighbour.
        title: above the map; label: of the colour bar.

    Raises:
        ValueError: shapes that do not fit, no tile, or values that are not finite.

    Examples:
        >>> from cbsa_torch.interpret import coordinate_map
        >>> coords = 512 * torch.tensor([[0, 0], [1, 0], [1, 1]])
        >>> figure = coordinate_map(coords, torch.rand(3), label="attention")
        >>> figure.savefig("map.png")
    """
    places, numbers = coords.detach().double().cpu().numpy(), values.detach().double().cpu().numpy()
    if places.ndim != 2 or places.shape[1] != 2 or 0 in places.shape:
        raise ValueError(f"coords must have shape (N, 2) with at least one tile, got {places.shape}")
    if numbers.shape != places.shape[:1]:
        raise ValueError(f"values must have shape ({len(places)},), one for each tile, got {numbers.shape}")
    if not (np.isfinite(places).all() and np.isfinite(numbers).all()):
        raise ValueError("coords and values must be finite")
    size = _spacing(coords.detach().double().cpu()) if tile_size is None else float(tile_size)
    low = places.min(0)
    extent = places.max(0) - low + size
    size = max(size, extent.max() / MOST_CELLS)
    columns, rows = np.floor((places - low) / size + ROUNDED).astype(np.int64).T
    shape = rows.max() + 1, columns.max() + 1
    flat = rows * shape[1] + columns
    counts = np.bincount(flat, minlength=shape[0] * shape[1])
    sums = np.bincount(flat, numbers, minlength=shape[0] * shape[1])
    cells = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).reshape(shape)
    least, most = np.percentile(numbers, (1, 99))
    figure = Figure(figsize=_map_size(shape), layout="constrained")
    axis = figure.subplots()
    box = (low[0], low[0] + shape[1] * size, low[1] + shape[0] * size, low[1])
    shown = axis.imshow(
        cells, cmap="magma", vmin=least, vmax=most, extent=box, interpolation="nearest", origin="upper"
    )
    axis.set(xlabel="x", ylabel="y", title=_style.legible(title))
    axis.set_facecolor("#e8e8e8")
    axis.ticklabel_format(style="plain", useOffset=False)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    figure.colorbar(shown, ax=axis, label=label, shrink=0.8)
    _style.finish(figure)
    axis.grid(visible=False)  # tiles are the grid
    return figure


def _spacing(places: Tensor) -> float:
    """The median distance of at most 256 tiles to the nearest tile elsewhere; 1 if all are at one place."""
    some = places[:: max(len(places) // 256, 1)][:256]
    nearest = torch.stack(
        [torch.where((away := (places - place).abs().amax(1)) > 0, away, math.inf).amin() for place in some]
    )
    found = nearest[nearest.isfinite()]
    return float(found.median()) if len(found) else 1.0


def _map_size(shape: tuple[int, int]) -> tuple[float, float]:
    """Width and height in inches of a map of rows and columns, with its colour bar."""
    long = 6.0 / max(shape)
    return max(long * shape[1], 1.5) + 1.8, max(long * shape[0], 1.5) + 0.9
