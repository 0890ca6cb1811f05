"""One row of many sequences without padding, each with its own prefix tokens and grid or coordinates.

Between the projections, sequences of one length and grid are a dense batch, and go through the ordinary code;
the others go one by one. The input projection is done once for the row.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cbsa_torch._core.checks import check_floating
from cbsa_torch._core.types import GridSize
from cbsa_torch.nn.tokens import Heads, check_num_prefix_tokens
from cbsa_torch.ops.coordinates import Coordinates, check_coords
from cbsa_torch.ops.packing import Rows, group_rows, join_rows, read_cu_seqlens, split_rows
from cbsa_torch.ops.pooling import check_grid


class Group(NamedTuple):
    """Sequences that are alike."""

    size: int
    """How many they are."""
    length: int
    """Tokens of each, with its prefix."""
    rows: Rows
    """Where they are in the row."""
    grid_size: GridSize | None
    coords: Coordinates | None
    """``(size, length - prefix, k)``."""
    num_prefix_tokens: int | None
    """None: what the grid, or the layer, says."""


class Packing:
    """Where sequences begin and end in a row of tokens, and where their tokens are.

    Make one for each forward pass of a model and hand it to all layers as ``cu_seqlens``: it is checked once,
    and cells of coordinates are searched once.

    Args:
        cu_seqlens: ``(S + 1,)`` int32 or int64: 0, and where each of S sequences ends. They may be empty.
        grid_sizes: the grid of each sequence, its tokens row-major after its prefix tokens. That of an empty
            sequence is ignored. Default: none, or squares where a layer needs a grid.
        coords: ``(T', k)`` as for :class:`cbsa_torch.nn.Coordinates`, of the tokens after the prefixes, in
            place of grids; an axis of size 1 may come before. Or a nested tensor of ``torch.jagged`` layout.
        num_prefix_tokens: class and register tokens at the beginning of each sequence (not of empty ones).
            Default: what grids or coordinates leave, or what the layer has.

    Attributes:
        cu_seqlens: as given. lengths: of the sequences. groups: those that are alike.

    Raises:
        ValueError: sequences, grids or coordinates that do not fit each other. TypeError: wrong dtypes.

    Examples:
        >>> from cbsa_torch import CBSA
        >>> from cbsa_torch.nn import Packing
        >>> packing = Packing(torch.tensor([0, 16, 46]), grid_sizes=[(4, 4), (5, 6)])
        >>> CBSA(64, 4)(torch.randn(1, 46, 64), cu_seqlens=packing).shape
        torch.Size([1, 46, 64])
    """

    def __init__(
        self,
        cu_seqlens: Tensor,
        *,
        grid_sizes: Sequence[GridSize] | None = None,
        coords: Tensor | None = None,
        num_prefix_tokens: int | None = None,
    ) -> None:
        if grid_sizes is not None and coords is not None:
            raise ValueError("pass grid_sizes or coords, not both")
        if num_prefix_tokens is not None:
            check_num_prefix_tokens(num_prefix_tokens)
        ends = read_cu_seqlens("cu_seqlens", cu_seqlens)
        self.cu_seqlens = cu_seqlens
        self.lengths = [stop - start for start, stop in itertools.pairwise(ends)]
        self.num_tokens = ends[-1]
        count = len(self.lengths)
        grids: list[GridSize | None] = [None] * count
        if grid_sizes is not None:
            if not isinstance(grid_sizes, (list, tuple)) or len(grid_sizes) != count:
                got = len(grid_sizes) if isinstance(grid_sizes, (list, tuple)) else repr(grid_sizes)
                raise ValueError(f"grid_sizes must have one grid for each of {count} sequences, got {got}")
            grids = [check_grid(grid) if n else None for grid, n in zip(grid_sizes, self.lengths, strict=True)]
        prefix = num_prefix_tokens
        if coords is not None:
            coords, prefix = self._read_coords(coords, num_prefix_tokens)
        for i, (n, grid) in enumerate(zip(self.lengths, grids, strict=True)):
            cells = None if grid is None else math.prod(grid)
            if n and (
                n < (prefix or 0) + (cells or 0) or (cells and prefix is not None and n != prefix + cells)
            ):
                grid_text = "" if grid is None else f" and grid_size {grid}"
                raise ValueError(
                    f"cu_seqlens gives sequence {i} {n} tokens, which do not fit {prefix or 0} prefix tokens"
                    f"{grid_text}"
                )
        own = [max(n - (prefix or 0), 0) for n in self.lengths]  # with coordinates
        starts = [0, *itertools.accumulate(own)]
        found = group_rows(ends, starts, device=cu_seqlens.device, keys=grids)
        places: list[Coordinates | None] = [None] * len(found)
        if coords is not None and found:
            parts = split_rows(coords, [alike.rows[1] for alike in found])
            places = [
                Coordinates(part.view(len(alike.members), alike.lengths[1], coords.shape[1]))
                for part, alike in zip(parts, found, strict=True)
            ]
        self.groups = [
            Group(len(alike.members), alike.lengths[0], alike.rows[0], grids[alike.members[0]], place, prefix)
            for alike, place in zip(found, places, strict=True)
        ]

    def _read_coords(self, coords: Tensor, num_prefix_tokens: int | None) -> tuple[Tensor, int]:
        lengths = None
        if isinstance(coords, Tensor) and coords.is_nested:
            lengths = _offsets("coords", coords).diff().tolist()
            coords = coords.values()
        if isinstance(coords, Tensor) and coords.ndim == 3 and coords.shape[0] == 1:
            coords = coords[0]
        if isinstance(coords, Tensor) and coords.ndim != 2:
            raise ValueError(f"coords must have shape (tokens, k) beside cu_seqlens, got {tuple(coords.shape)}")
        check_coords(coords[None] if isinstance(coords, Tensor) else coords)
        filled = sum(n > 0 for n in self.lengths)
        left = self.num_tokens - coords.shape[0]
        prefix = left // max(filled, 1) if num_prefix_tokens is None else num_prefix_tokens
        if prefix < 0 or prefix * filled != left:
            text = "as many" if num_prefix_tokens is None else str(num_prefix_tokens)
            raise ValueError(
                f"coords must have shape (tokens, k) for {self.num_tokens} tokens less {text} prefix tokens of "
                f"each of {filled} sequences, got {tuple(coords.shape)}"
            )
        own = [max(n - prefix, 0) for n in self.lengths]
        for i, (n, given) in enumerate(zip(own, own if lengths is None else lengths, strict=True)):
            if n != given:
                raise ValueError(f"coords must have {n} rows for the tokens of sequence {i}, got {given}")
        bad = ~torch.isfinite(coords).all(1)
        if bad.any():
            i = bisect.bisect_right(list(itertools.accumulate(own)), int(bad.nonzero()[0]))
            raise ValueError(f"coords must be finite, got NaN or infinity in sequence {i}")
        return coords, prefix

    def split(self, heads: Heads) -> Iterator[tuple[Group, Heads]]:
        """The heads ``(1, H, tokens, P)`` of the row as dense batches, whose source has their tokens alone."""
        parts: dict[int, list[Tensor]] = {}
        for part in (heads.queries, heads.keys, heads.values):
            if id(part) not in parts:
                parts[id(part)] = [rows.transpose(1, 2) for rows in self._batches(part[0].transpose(0, 1))]
        row = heads.source.x[0]
        for number, (group, x) in enumerate(zip(self.groups, self._batches(row), strict=True)):
            queries, keys, values = (
                parts[id(part)][number] for part in (heads.queries, heads.keys, heads.values)
            )
            yield group, Heads(heads.source._replace(x=x), queries, keys, values, heads.basis)

    def _batches(self, row: Tensor) -> list[Tensor]:
        """The groups' ``(size, length, ...)`` of a row ``(tokens, ...)``."""
        parts = split_rows(row, [group.rows for group in self.groups]) if self.groups else []
        return [
            part.unflatten(0, (group.size, group.length))
            for part, group in zip(parts, self.groups, strict=True)
        ]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The row ``(tokens, C)`` of the groups' ``(size, length, C)``."""
        return join_rows([part.flatten(0, 1) for part in parts], [group.rows for group in self.groups])


def read_packed(
    x: Any,
    dim: int,
    cu_seqlens: Tensor | Packing | None,
    grid_sizes: Sequence[GridSize] | None,
    coords: Tensor | Coordinates | None,
    num_prefix_tokens: int | None,
) -> tuple[Tensor, Packing]:
    """The row ``(T, dim)`` of tokens that a mixer is given, and what is packed in it."""
    check_floating("x", x)
    if x.is_nested:
        offsets = _offsets("x", x)
        given = cu_seqlens.cu_seqlens if isinstance(cu_seqlens, Packing) else cu_seqlens
        if isinstance(given, Tensor) and given.tolist() != offsets.tolist():
            raise ValueError(
                f"cu_seqlens must be the offsets of the nested x, {offsets.tolist()[:20]}, got "
                f"{given.tolist()[:20]}"
            )
        cu_seqlens = offsets if cu_seqlens is None else cu_seqlens
        x = x.values()
    rows = x[0] if x.ndim == 3 and x.shape[0] == 1 else x
    if rows.ndim != 2 or rows.shape[1] != dim:
        raise ValueError(
            f"x must have shape (1, T, C) or (T, C) with C={dim} for packed sequences, got {tuple(x.shape)}"
        )
    if isinstance(coords, Coordinates):
        raise ValueError(
            "coords must be a tensor for packed sequences; all layers of a model may share a Packing"
        )
    if isinstance(cu_seqlens, Packing):
        if grid_sizes is not None or coords is not None:
            raise ValueError("grid_sizes and coords cannot be given beside a Packing, which has them")
        packing = cu_seqlens
    else:
        assert cu_seqlens is not None, "of what is not nested"
        packing = Packing(cu_seqlens, grid_sizes=grid_sizes, coords=coords, num_prefix_tokens=num_prefix_tokens)
    if packing.num_tokens != rows.shape[0]:
        raise ValueError(
            f"cu_seqlens must end at the number of tokens of x ({rows.shape[0]}), got {packing.num_tokens}"
        )
    return rows, packing


def restore_packed(rows: Tensor, like: Any) -> Tensor:
    """A row ``(T, C)`` in the layout of a mixer's input: nested, with an axis before, or as it is."""
    if like.is_nested:
        return torch.nested.nested_tensor_from_jagged(rows, offsets=like.offsets())
    return rows[None] if like.ndim == 3 else rows


def _offsets(name: str, nested: Any) -> Tensor:
    if nested.layout != torch.jagged or nested.lengths() is not None or nested.dim() != 3:
        raise ValueError(
            f"{name} must be a contiguous nested tensor (B, tokens, channels) of layout torch.jagged, "
            f"got {nested.layout} with {nested.dim()} axes"
        )
    offsets: Tensor = nested.offsets()
    return offsets
