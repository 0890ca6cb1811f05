"""Initial representatives by average pooling over the tokens' grid (paper, section 3.2), any dimension.

A grid is pooled to the representative grid of at most so many cells that is closest to it in aspect, or to a
fixed one. With a mask, each item is pooled over the bounding box of its own real tokens, so that an item in a
padded batch gets exactly the representatives it would get alone.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from cbsa_torch._core.checks import check_floating, check_mask, check_positive_int, check_shape
from cbsa_torch._core.compiler import called_while_tracing
from cbsa_torch._core.precision import compute_dtype, no_autocast
from cbsa_torch._core.tracing import is_open, pin_sides
from cbsa_torch._core.types import GridPooling, GridSize, Representatives
from cbsa_torch.ops.masking import zero_rows
from cbsa_torch.ops.parallel import ContextParallel, largest, total
from cbsa_torch.ops.slab import Slab, slab_of

LARGE_CELL = 256
"""Tokens per cell from which products with matrices beat PyTorch's pooling on CUDA."""

_ADAPTIVE_POOL: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


def representative_grid(grid_size: GridSize, num_representatives: int | Sequence[int]) -> GridSize:
    """The grid of cells that ``grid_size`` is pooled to, no finer than ``grid_size`` along any axis.

    A number M gives the grid of at most M cells that is closest to ``grid_size`` in aspect: it minimises
    (largest / smallest ratio of sides) / (number of cells)^2, uses many representatives, but does not stretch
    them. ``(14, 14)`` with 64 gives ``(8, 8)``; ``(10, 40)`` with 64 gives ``(4, 16)``; ``(5,)`` with 64 gives
    ``(5,)``.

    A sequence gives that grid whatever the aspect, as in the official code, but at most one cell per token
    along each axis: with ``(8, 8)``, ``(18, 24)`` gives ``(8, 8)``, and ``(5, 40)`` gives ``(5, 8)``, where
    PyTorch's adaptive pooling to 8 x 8 would repeat tokens.

    Args:
        grid_size: one to three positive integers.
        num_representatives: M, or the cells along each axis, of the initial guess of Eq. 5.

    Raises:
        ValueError: no grid, or cells along other axes. TypeError: counts that are not integers.

    Examples:
        >>> from cbsa_torch.ops import representative_grid
        >>> representative_grid((14, 14), 64), representative_grid((10, 40), 64)
        ((8, 8), (4, 16))
        >>> representative_grid((5, 40), (8, 8))
        (5, 8)
    """
    grid_size = check_grid(grid_size)
    return _cells(grid_size, check_num_representatives(num_representatives, grid_size))


def pool_representatives(
    tokens: Tensor,
    grid_size: GridSize,
    num_representatives: int | Sequence[int],
    *,
    token_mask: Tensor | None = None,
    parallel: ContextParallel | None = None,
    num_prefix_tokens: int = 0,
) -> Representatives:
    """Average-pool tokens over their grid into initial representatives Q_ini.

    Args:
        tokens: ``(B, H, N, P)`` grid tokens only (no prefix tokens), row-major, N = product of ``grid_size``.
        grid_size: ``(L,)``, ``(height, width)`` or ``(depth, height, width)``.
        num_representatives: the most representatives to make, or the cells along each axis of the grid; never
            more than there are tokens. See :func:`representative_grid`.
        token_mask: ``(B, N)`` bool, True = a real token. Cells without real tokens give no representative.
        parallel: which tokens these are, if others are on other ranks: ``tokens`` are then all of this rank,
            and ``grid_size`` is the grid of all ranks. Every rank gets the same representatives.
        num_prefix_tokens: tokens before the grid; with ``parallel`` only.

    Returns:
        :class:`Representatives`: values ``(B, H, M, P)``, the weights of the tokens in them, and, if a mask was
        given, their mask ``(B, M)``.

    Raises:
        ValueError: a grid that is not one to three positive integers or does not fit ``tokens``, a mask of
            another shape, a count below 1, cells along other axes than those of the grid. TypeError: wrong
            dtypes, counts that are not integers.

    Examples:
        >>> from cbsa_torch.ops import pool_representatives
        >>> tokens = torch.arange(16.0).view(1, 1, 16, 1)  # a grid of 4 x 4
        >>> pool_representatives(tokens, (4, 4), 4).values.flatten()
        tensor([ 2.5000,  4.5000, 10.5000, 12.5000])
    """
    check_floating("tokens", tokens)
    tokens = pin_sides(tokens, grid_size)
    grid_size = check_grid(grid_size)
    number = check_num_representatives(num_representatives, grid_size)
    if parallel is None:
        if num_prefix_tokens:
            raise ValueError(
                "num_prefix_tokens must be 0 without parallel: give the grid tokens only, "
                f"got {num_prefix_tokens}"
            )
        axes = f"(B, H, N, P) for grid_size {grid_size}"
        check_shape("tokens", tokens, (None, None, math.prod(grid_size), None), axes)
    else:
        check_shape("tokens", tokens, (None, None, parallel.length, None), "(B, H, N, P) of this rank")
        if num_prefix_tokens + math.prod(grid_size) > parallel.num_tokens:
            raise ValueError(
                f"grid_size {grid_size} and {num_prefix_tokens} prefix tokens are more than the "
                f"{parallel.num_tokens} tokens of all ranks"
            )
    b, h, n, p = tokens.shape
    cells = _cells(grid_size, number)
    if token_mask is not None:
        check_mask("token_mask", token_mask, (b, n), "(B, N)", "a real token", ("tokens", tokens))
    if parallel is not None:
        slab = slab_of(grid_size, num_prefix_tokens - parallel.start, n)
        if token_mask is None:
            return _pool_slab(tokens, cells, slab, parallel, num_prefix_tokens)
        return _pool_masked(tokens, grid_size, number, token_mask, slab, parallel)
    if token_mask is not None:
        return _pool_masked(tokens, grid_size, number, token_mask)
    weights = GridPooling(grid_size, cells)
    of_any_size = is_open(*grid_size)
    if not of_any_size and cells == grid_size:
        return Representatives(tokens, token_weights=weights)
    # Channels last, strides as PyTorch expects them of such: no copy for the heads of a joint projection, and
    # a kernel that is twenty times faster, forward and backward.
    channels_last = tokens.transpose(1, 2).reshape(b, *grid_size, h * p)
    if of_any_size:
        pooled = _pool_any_size(channels_last, cells)
    elif tokens.is_cuda and n >= LARGE_CELL * math.prod(cells):
        pooled = _pool_by_products(channels_last, cells)
    else:
        with no_autocast(channels_last):  # on the CPU it makes float32 of volumes
            pooled = _ADAPTIVE_POOL[len(grid_size)](channels_last.movedim(-1, 1), cells).movedim(1, -1)
    values = pooled.reshape(b, math.prod(cells), h, p).transpose(1, 2)
    return Representatives(values, token_weights=weights)


def _pool_by_products(channels_last: Tensor, cells: GridSize) -> Tensor:
    """Adaptive average pooling of ``(B, *grid, C)`` to ``(B, *cells, C)``, one product with a matrix per axis.

    The matrices hold powers of two, exact in every dtype, which keep the sums in the range of the tokens; the
    sizes of the windows come in at the end.
    """
    b, *grid_size, c = channels_last.shape
    device, dtype = channels_last.device, channels_last.dtype
    pooled, factor = channels_last, torch.ones((), device=device, dtype=compute_dtype(dtype))
    with no_autocast(channels_last):
        for axis, (side, count) in enumerate(zip(grid_size, cells, strict=True)):
            bound = 1 << (-(-side // count)).bit_length()  # at least the tokens of a window
            member = window_members(side, count, device).to(dtype)
            pooled = (member / bound) @ pooled.reshape(b * math.prod(cells[:axis]), side, -1)
            factor = factor[..., None] * (bound / member.sum(1, dtype=factor.dtype))
        return (pooled.reshape(b, *cells, c) * factor[..., None]).to(dtype)


def _pool_any_size(channels_last: Tensor, cells: GridSize) -> Tensor:
    """:func:`_pool_by_products` for sides that an export leaves open: the matrices are made in the graph."""
    b, *grid_size, c = channels_last.shape
    with no_autocast(channels_last):
        pooled = channels_last.to(compute_dtype(channels_last.dtype))
        for axis, (side, count) in enumerate(zip(grid_size, cells, strict=True)):
            rows = pooled.reshape(b * math.prod(cells[:axis]), side, c * math.prod(grid_size[axis + 1 :]))
            pooled = averages(side, count, pooled) @ rows
        return pooled.reshape(b, *cells, c).to(channels_last.dtype)


def window_members(side: int, count: int, device: torch.device) -> Tensor:
    """Which of ``side`` positions lie in the window of each of ``count`` cells: ``(count, side)`` bool."""
    cell, position = torch.arange(count, device=device), torch.arange(side, device=device)
    return _in_window(cell[:, None], position, side, count)


def _in_window(cell: Any, position: Tensor, size: Any, count: Any) -> Tensor:
    """Whether a position lies in the window of a cell, ``count`` of them on a side of ``size``, as in PyTorch.

    Windows of adaptive pooling reach from floor(cell size / count) up to ceil((cell + 1) size / count).
    """
    inside: Tensor = (position >= cell * size // count) & (position < ((cell + 1) * size + count - 1) // count)
    return inside


def check_grid(grid_size: GridSize) -> GridSize:
    """Return ``grid_size`` as plain integers; raise ``ValueError`` unless it is one to three positive ones.

    Sides that an export leaves open stay expressions.
    """
    try:
        # A grid decides shapes: a compiler that made it symbolic fixes it here.
        sides = tuple(side if is_open(side) else operator.index(side) for side in grid_size)
    except TypeError:
        sides = ()
    if not 1 <= len(sides) <= 3 or any(side < 1 for side in sides):
        raise ValueError(f"grid_size must be a tuple of one to three positive integers, got {grid_size!r}")
    return sides


def check_num_representatives(value: int | Sequence[int], grid_size: GridSize | None = None) -> int | GridSize:
    """Return ``value`` as an integer or, if it is a grid of cells, as a tuple of integers.

    Raise unless they are at least 1 and, if ``grid_size`` is given, along the axes of that.
    """
    if not isinstance(value, (tuple, list)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(
                "num_representatives must be an int, or a tuple of one to three for a fixed grid, "
                f"got {value!r} of type {type(value).__name__}"
            )
        check_positive_int("num_representatives", value)
        return operator.index(value)  # fixed where a compiler made it symbolic, as grids are
    if not 1 <= len(value) <= 3:
        raise ValueError(
            f"num_representatives must be an int, or a tuple of one to three for a fixed grid, got {value!r}"
        )
    for axis, count in enumerate(value):
        check_positive_int(f"num_representatives[{axis}]", count)
    if grid_size is not None and len(value) != len(grid_size):
        raise ValueError(
            "num_representatives must be an int or have one entry for each axis of the grid, "
            f"got {value!r} for grid_size {grid_size}"
        )
    return tuple(map(operator.index, value))


@called_while_tracing
def _cells(grid_size: GridSize, number: int | GridSize) -> GridSize:
    """:func:`representative_grid` of checked arguments."""
    if not is_open(*grid_size):
        return _search(grid_size, number)[0] if isinstance(number, int) else tuple(map(min, number, grid_size))
    if isinstance(number, int):
        raise ValueError(
            f"num_representatives must be a grid such as {_like(number, len(grid_size))} where an export "
            f"leaves height and width open (dynamic), got {number}: of a number the grid of representatives "
            "follows the aspect of the image, and the program would keep that of the example. Build the layers "
            "with a grid, or fix it by cbsa_torch.models.with_fixed_grid; or export for images of one size"
        )
    pairs = zip(number, grid_size, strict=True)
    return tuple(cast(int, torch.sym_min(count, side)) for count, side in pairs)


def _like(number: int, axes: int) -> GridSize:
    """The grid of at most ``number`` cells with equal sides."""
    return _search((number,) * axes, number)[0]


@called_while_tracing
def _candidates(grid_size: GridSize, limit: int) -> tuple[GridSize, ...]:
    return _search(grid_size, limit)[1]


def scripted_pool(
    tokens: Tensor, first: int, grid_size: tuple[int, int], limit: int, cells: tuple[int, int]
) -> Tensor:
    """Average pooling of images, as TorchScript can compile it.

    Args:
        tokens: ``(B, H, N, P)``, those of the grid after ``first`` others.
        first: tokens before the grid.
        grid_size: height and width.
        limit: at most as many cells, those of :func:`representative_grid`; 0: as given.
        cells: along both axes, if there is no limit.

    Returns:
        ``(B, H, M, P)``.
    """
    b, h, _, p = tokens.shape
    height, width = grid_size
    rows, columns = min(cells[0], height), min(cells[1], width)
    if limit > 0:
        rows, columns, lowest = 1, 1, float("inf")
        for r in range(1, min(height, limit) + 1):
            for c in range(1, min(width, limit // r) + 1):
                a, b_ = r / height, c / width
                cost = max(a, b_) / min(a, b_) / (r * c) ** 2
                if cost < lowest:
                    rows, columns, lowest = r, c, cost
    grid = tokens[:, :, first : first + height * width].transpose(2, 3).reshape(b, h * p, height, width)
    pooled = F.adaptive_avg_pool2d(grid, (rows, columns))
    return pooled.view(b, h, p, rows * columns).transpose(2, 3)


@functools.lru_cache(maxsize=1024)
def _search(grid_size: GridSize, limit: int) -> tuple[GridSize, tuple[GridSize, ...]]:
    """The closest grid, and all that were considered, in fixed order."""

    def cost(cells: GridSize) -> float:
        ratios = [c / g for c, g in zip(cells, grid_size, strict=True)]
        return max(ratios) / min(ratios) / math.prod(cells) ** 2

    considered = tuple(_grids_within(grid_size, limit))
    return min(considered, key=cost), considered


def _grids_within(grid_size: GridSize, limit: int) -> Iterator[GridSize]:
    """Every grid with at most ``limit`` cells and no side above that of ``grid_size``."""
    if not grid_size:
        yield ()
        return
    for side in range(1, min(grid_size[0], limit) + 1):
        for rest in _grids_within(grid_size[1:], limit // side):
            yield (side, *rest)


def _pool_slab(
    tokens: Tensor, cells: GridSize, slab: Slab, parallel: ContextParallel, num_prefix_tokens: int
) -> Representatives:
    """Pooling of the tokens of all ranks: each adds what its own are of every average."""
    b, h, _, p = tokens.shape
    dtype = compute_dtype(tokens.dtype)
    with no_autocast(tokens):
        pooled = slab.cover(tokens.to(dtype).transpose(1, 2).flatten(2))  # (B, *slab, H * P)
        sides = slab.shape
        for axis in range(len(cells) - 1, -1, -1):  # rows last: what this leaves of them are the cells
            matrix = averages(slab.grid_size[axis], cells[axis], pooled)
            if axis == 0:
                matrix = matrix[:, slab.rows]
            after = math.prod(cells[axis + 1 :])
            pooled = matrix @ pooled.reshape(b * math.prod(sides[:axis]), sides[axis], after * h * p)
        values = total(pooled.reshape(b, math.prod(cells), h * p), parallel.group).to(tokens.dtype)
    weights = GridPooling(slab.grid_size, cells, num_prefix_tokens - parallel.start)
    return Representatives(values.unflatten(-1, (h, p)).transpose(1, 2), token_weights=weights)


def averages(side: int, count: int, like: Tensor) -> Tensor:
    """Average pooling of one axis as a matrix ``(count, side)``, in the dtype and on the device of ``like``."""
    member = window_members(side, count, like.device).to(like.dtype)
    return member / member.sum(1, keepdim=True)


def _pool_masked(
    tokens: Tensor,
    grid_size: GridSize,
    number: int | GridSize,
    token_mask: Tensor,
    slab: Slab | None = None,
    parallel: ContextParallel | None = None,
) -> Representatives:
    """Masked pooling, written without data-dependent shapes so that it compiles and exports.

    With a ``slab``, of the tokens of all ranks: they agree on the bounding boxes, and add up sums and numbers.
    """
    b, h, n, p = tokens.shape
    device = tokens.device
    if slab is None:
        first, extent = _bounding_box(token_mask.view(b, *grid_size))  # (B, D) each
    else:
        assert parallel is not None
        first, extent = _bounding_box(slab.cover(token_mask[..., None])[..., 0], slab, parallel)
    if isinstance(number, int):
        cells = _closest_per_item(extent, grid_size, number)  # (B, D)
        most = max(math.prod(c) for c in _candidates(grid_size, number))
    else:
        cells = extent.minimum(torch.tensor(number, device=device))
        most = math.prod(_cells(grid_size, number))
    index = torch.arange(most, device=device)  # (M,)
    weights: Tensor = torch.ones(b, most, 1, dtype=torch.bool, device=device)
    remaining = cells.prod(-1)  # (B,)
    exists = index[None] < remaining[:, None]  # (B, M)
    for axis, side in enumerate(grid_size):
        count, size = cells[:, axis, None, None], extent[:, axis, None, None]  # (B, 1, 1)
        remaining = remaining // cells[:, axis]
        cell = index[:, None] // remaining[:, None, None] % count  # (B, M, 1): this cell's index along the axis
        place = torch.arange(side, device=device)
        if slab is not None and axis == 0:
            place = place[slab.rows]
        position = (place - first[:, axis, None])[:, None]  # (B, 1, side)
        member = _in_window(cell, position, size, count)
        weights = (weights[..., None] & member[:, :, None]).flatten(2)
    if slab is not None:
        weights = slab.take(weights.mT.unflatten(1, slab.shape)).mT
    weights = weights & token_mask[:, None]  # (B, M, N)
    number_of = weights.sum(-1, keepdim=True)
    dtype = compute_dtype(tokens.dtype)
    with no_autocast(tokens):
        # Heads as channels: batched by heads, the product would keep a copy of the weights for each.
        clean = zero_rows(tokens, token_mask).to(dtype).transpose(1, 2).reshape(b, n, h * p)
        if parallel is None:
            average = weights.to(dtype) / number_of.clamp(min=1).to(dtype)
            pooled = average @ clean
        else:
            members = weights.to(dtype)
            sums = torch.cat([members @ clean, number_of.to(dtype)], -1)
            sums = total(sums, parallel.group)  # (B, M, H * P + 1)
            number_of = sums[..., -1:].detach()
            pooled, average = (x / number_of.clamp(min=1) for x in (sums[..., :-1], members))
        values = pooled.view(b, most, h, p).transpose(1, 2).to(tokens.dtype)  # (B, H, M, P)
    exists = exists & (number_of[..., 0] > 0)
    return Representatives(zero_rows(values, exists), exists, token_weights=average)


def _bounding_box(
    real: Tensor, slab: Slab | None = None, parallel: ContextParallel | None = None
) -> tuple[Tensor, Tensor]:
    """First index and extent ``(B, D)`` of the real tokens of a ``(B, *grid)`` mask along each axis.

    With a ``slab``, ``real`` is of its shape, and the boxes are those of all ranks' tokens.
    """
    lows, highs = [], []
    axes = range(1, real.ndim)
    for axis in axes:
        others = [a for a in axes if a != axis]
        line = real.any(dim=others) if others else real  # (B, side)
        position, side = torch.arange(line.shape[1], device=real.device), line.shape[1]
        if slab is not None:
            side = slab.grid_size[axis - 1]
            position = position + (slab.rows.start if axis == 1 else 0)
        low, high = torch.where(line, position, side - 1), torch.where(line, position, 0)
        if slab is not None:  # a place for slabs without rows
            low, high = F.pad(low, (0, 1), value=side - 1), F.pad(high, (0, 1))
        lows.append(low.amin(-1))
        highs.append(high.amax(-1))
    low, high = torch.stack(lows, -1), torch.stack(highs, -1)
    if parallel is not None:
        negative, high = largest(torch.stack([-low, high]), parallel.group)
        low = -negative
    return low, (high - low + 1).clamp(min=1)  # an item without real tokens: one empty cell


def _closest_per_item(extent: Tensor, grid_size: GridSize, limit: int) -> Tensor:
    """:func:`representative_grid` for the extents ``(B, D)`` of every item at once.

    The arithmetic is that of ``_search`` operation by operation in float64, so both choose alike.
    """
    candidates = torch.tensor(_candidates(grid_size, limit), device=extent.device)  # (K, D)
    dtype = torch.float32 if extent.device.type == "mps" else torch.float64
    ratios = candidates.to(dtype) / extent[:, None].to(dtype)  # (B, K, D)
    distortion = ratios.amax(-1) / ratios.amin(-1)
    cost = distortion / (candidates.prod(-1) ** 2).to(dtype)
    fits = (candidates <= extent[:, None]).all(-1)
    cost = cost.masked_fill(~fits, float("inf"))  # (B, K)
    # The first of the smallest; argmin does not promise which.
    position = torch.arange(candidates.shape[0], device=extent.device)
    best = torch.where(cost == cost.amin(-1, keepdim=True), position, candidates.shape[0]).amin(-1)
    return candidates[best]
