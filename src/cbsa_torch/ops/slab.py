"""The part of a grid that some of its tokens cover, widened to whole rows: tokens spread over processes."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from cbsa_torch._core.types import GridSize


class Slab(NamedTuple):
    """Where a rank's tokens lie in the grid; made by :func:`slab_of`. A row is what one index of axis 0 has."""

    grid_size: GridSize
    """Of the whole grid."""
    rows: slice
    """Those that the tokens lie in."""
    before: int
    """The rank's tokens that stand before the grid."""
    inside: int
    """Those in it."""
    after: int
    """Those after it."""
    front: int
    """Places of the first row that other ranks hold."""
    back: int
    """Of the last row."""

    @property
    def shape(self) -> GridSize:
        """The slab as a grid."""
        return (self.rows.stop - self.rows.start, *self.grid_size[1:])

    def cover(self, tokens: Tensor) -> Tensor:
        """``(B, n, D)`` of the rank as ``(B, *shape, D)``, zero where others' tokens are."""
        own = tokens[:, self.before : self.before + self.inside]
        return F.pad(own, (0, 0, self.front, self.back)).unflatten(1, self.shape)

    def take(self, slab: Tensor) -> Tensor:
        """``(B, *shape, D)`` for the rank's tokens ``(B, n, D)``, zero for those outside of the grid."""
        flat = slab.flatten(1, -2)[:, self.front : self.front + self.inside]
        return F.pad(flat, (0, 0, self.before, self.after))


def slab_of(grid_size: GridSize, first: int, n: int) -> Slab:
    """The slab of ``n`` tokens in a row.

    Args:
        grid_size: the whole grid.
        first: tokens before the grid, of these ``n``; negative if the first of them has that place in the grid.
        n: tokens of the rank.
    """
    length = math.prod(grid_size)
    row = length // grid_size[0]
    low = min(max(0, -first), length)
    high = max(low, min(length, n - first))
    rows = slice(low // row, -(-high // row))
    if low == high:
        rows = slice(rows.start, rows.start)
    before = min(n, max(0, first))
    front, back = (low - rows.start * row, rows.stop * row - high) if high > low else (0, 0)
    return Slab(grid_size, rows, before, high - low, n - before - (high - low), front, back)
