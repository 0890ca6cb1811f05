"""Initial representatives by average pooling over the tokens' grid (paper, section 3.2), any dimension.

A grid is pooled to the representative grid closest to it in aspect. With a mask, each item is pooled over
the bounding box of its own real tokens, so that an item in a padded batch gets exactly the representatives
it would get alone.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cbsa_torch._core.checks import check_floating, check_mask, check_positive_int, check_shape
from cbsa_torch._core.compiler import called_while_tracing
from cbsa_torch._core.precision import compute_dtype, no_autocast
from cbsa_torch._core.tracing import refuse_dynamic
from cbsa_torch._core.types import GridPooling, GridSize, Representatives
from cbsa_torch.ops.masking import zero_rows

LARGE_CELL = 256
"""Tokens per cell from which products with matrices beat PyTorch's pooling on CUDA."""

_ADAPTIVE_POOL: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


def representative_grid(grid_size: GridSize, num_representatives: int) -> GridSize:
    """The grid of at most ``num_representatives`` cells that is closest to ``grid_size`` in aspect.

    Among grids no finer than ``grid_size`` along any axis, it minimises (largest / smallest ratio of sides)
    / (number of cells)^2: use many representatives, but do not stretch them. ``(14, 14)`` with 64 gives
    ``(8, 8)``; ``(10, 40)`` with 64 gives ``(4, 16)``; ``(5,)`` with 64 gives ``(5,)``.
    """
    grid_size = check_grid(grid_size)
    check_positive_int("num_representatives", num_representatives)
    return _closest(grid_size, num_representatives)


def pool_representatives(
    tokens: Tensor, grid_size: GridSize, num_representatives: int, *, token_mask: Tensor | None = None
) -> Representatives:
    """Average-pool tokens over their grid into initial representatives Q_ini.

    Args:
        tokens: ``(B, H, N, P)`` grid tokens only (no prefix tokens), row-major, N = product of ``grid_size``.
        grid_size: ``(L,)``, ``(height, width)`` or ``(depth, height, width)``.
        num_representatives: the most representatives to make; never more than there are tokens.
        token_mask: ``(B, N)`` bool, True = a real token. Cells without real tokens give no representative.

    Returns:
        :class:`Representatives`: values ``(B, H, M, P)``, the weights of the tokens in them, and, if a mask was
        given, their mask ``(B, M)``.

    Raises:
        ValueError: a grid that is not one to three positive integers or does not fit ``tokens``, a mask of
            another shape, a count below 1. TypeError: wrong dtypes.
    """
    check_floating("tokens", tokens)
    grid_size = check_grid(grid_size)
    check_positive_int("num_representatives", num_representatives)
    axes = f"(B, H, N, P) for grid_size {grid_size}"
    check_shape("tokens", tokens, (None, None, math.prod(grid_size), None), axes)
    b, h, n, p = tokens.shape
    if token_mask is not None:
        check_mask("token_mask", token_mask, (b, n), "(B, N)", "a real token", ("tokens", tokens))
        return _pool_masked(tokens, grid_size, num_representatives, token_mask)
    cells = _closest(grid_size, num_representatives)
    weights = GridPooling(grid_size, cells)
    if cells == grid_size:
        return Representatives(tokens, token_weights=weights)
    # Channels last, strides as PyTorch expects them of such: no copy for the heads of a joint projection, and
    # a kernel that is twenty times faster, forward and backward.
    channels_last = tokens.transpose(1, 2).reshape(b, *grid_size, h * p)
    if tokens.is_cuda and n >= LARGE_CELL * math.prod(cells):
        pooled = _pool_by_products(channels_last, cells)
    else:
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
    """Return ``grid_size`` as plain integers; raise ``ValueError`` unless it is one to three positive ones."""
    refuse_dynamic("height and width (grid_size)", grid_size)
    try:
        # A grid decides shapes: a compiler that made it symbolic fixes it here.
        sides = tuple(operator.index(side) for side in grid_size)
    except TypeError:
        sides = ()
    if not 1 <= len(sides) <= 3 or min(sides) < 1:
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
        return value
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
def _closest(grid_size: GridSize, limit: int) -> GridSize:
    return _search(grid_size, limit)[0]


@called_while_tracing
def _candidates(grid_size: GridSize, limit: int) -> tuple[GridSize, ...]:
    return _search(grid_size, limit)[1]


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


def _pool_masked(tokens: Tensor, grid_size: GridSize, limit: int, token_mask: Tensor) -> Representatives:
    """Masked pooling, written without data-dependent shapes so that it compiles and exports."""
    b, h, n, p = tokens.shape
    device = tokens.device
    real = token_mask.view(b, *grid_size)
    first, extent = _bounding_box(real)  # (B, D) each
    cells = _closest_per_item(extent, grid_size, limit)  # (B, D)

    most = max(math.prod(c) for c in _candidates(grid_size, limit))
    index = torch.arange(most, device=device)  # (M,)
    weights: Tensor = torch.ones(b, most, 1, dtype=torch.bool, device=device)
    remaining = cells.prod(-1)  # (B,)
    exists = index[None] < remaining[:, None]  # (B, M)
    for axis, side in enumerate(grid_size):
        count, size = cells[:, axis, None, None], extent[:, axis, None, None]  # (B, 1, 1)
        remaining = remaining // cells[:, axis]
        cell = index[:, None] // remaining[:, None, None] % count  # (B, M, 1): this cell's index along the axis
        position = (torch.arange(side, device=device) - first[:, axis, None])[:, None]  # (B, 1, side)
        member = _in_window(cell, position, size, count)
        weights = (weights[..., None] & member[:, :, None]).flatten(2)
    weights = weights & token_mask[:, None]  # (B, M, N)
    total = weights.sum(-1, keepdim=True)
    exists = exists & (total[..., 0] > 0)
    dtype = compute_dtype(tokens.dtype)
    with no_autocast(tokens):
        average = weights.to(dtype) / total.clamp(min=1).to(dtype)
        # Heads as channels: batched by heads, the product would keep a copy of the weights for each.
        clean = zero_rows(tokens, token_mask).to(dtype).transpose(1, 2).reshape(b, n, h * p)
        values = (average @ clean).view(b, most, h, p).transpose(1, 2).to(tokens.dtype)  # (B, H, M, P)
    return Representatives(zero_rows(values, exists), exists, token_weights=average)


def _bounding_box(real: Tensor) -> tuple[Tensor, Tensor]:
    """First index and extent ``(B, D)`` of the real tokens of a ``(B, *grid)`` mask along each axis."""
    firsts, extents = [], []
    axes = range(1, real.ndim)
    for axis in axes:
        others = [a for a in axes if a != axis]
        line = real.any(dim=others) if others else real  # (B, side)
        position = torch.arange(line.shape[1], device=real.device)
        low = torch.where(line, position, line.shape[1] - 1).amin(-1)
        high = torch.where(line, position, 0).amax(-1)
        firsts.append(low)
        extents.append((high - low + 1).clamp(min=1))  # an item without real tokens: one empty cell
    return torch.stack(firsts, -1), torch.stack(extents, -1)


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
