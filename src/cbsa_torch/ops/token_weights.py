"""Pi, the weights by which tokens make up an initial guess of the representatives.

Three forms are worked with: matrices ``(1 or B, M, N)`` over all tokens, with zeros for what does not exist;
average pooling of a grid, whose matrix is the Kronecker product of one small matrix per axis; and means over
cells, whose matrix has one entry for each token. The last two are not written out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cbsa_torch._core.checks import check_device, check_floating
from cbsa_torch._core.precision import compute_dtype
from cbsa_torch._core.types import CellPooling, GridPooling
from cbsa_torch.ops.coordinates import spread_from_cells
from cbsa_torch.ops.masking import zero_rows
from cbsa_torch.ops.pooling import averages
from cbsa_torch.ops.slab import slab_of

TokenWeights = Tensor | GridPooling | CellPooling


def over_all_tokens(
    weights: TokenWeights, tokens: Tensor, m: int, first: int, token_mask: Tensor | None, mask: Tensor | None
) -> TokenWeights:
    """Check Pi as a strategy gives it, and bring it into one of the forms.

    Args:
        weights: ``(M, n)`` or ``(B, M, n)``, or a pooling.
        tokens: ``(B, H, N, P)``.
        m: number of representatives.
        first: tokens before those that ``weights`` are over.
        token_mask: ``(B, N)`` bool. mask: ``(B, M)`` bool, of the representatives.

    Raises:
        ValueError: weights that do not fit. TypeError: they are not floating-point.
    """
    b, _, n, _ = tokens.shape
    if isinstance(weights, GridPooling):
        if len(weights.grid_size) != len(weights.cells) or weights.first < 0:
            raise ValueError(
                "token_weights must pool a grid into cells along the same axes, from a first token of at least "
                f"0, got {weights}"
            )
        rows, length = math.prod(weights.cells), weights.first + math.prod(weights.grid_size)
    elif isinstance(weights, CellPooling):
        check_cells(weights, tokens)
        rows, length = weights.cells.counts.shape[1], weights.first + weights.cells.cell.shape[1]
    else:
        check_floating("token_weights", weights)
        check_device("token_weights", weights, "tokens", tokens)
        if weights.ndim not in (2, 3) or (weights.ndim == 3 and weights.shape[0] != b):
            raise ValueError(
                f"token_weights must have shape (M, N) or (B, M, N) with B={b}, got {tuple(weights.shape)}"
            )
        rows, length = weights.shape[-2:]
    if rows != m or first + length > n:
        raise ValueError(
            f"token_weights must make {m} representatives of at most {n - first} tokens (all less the "
            f"prefix), got {rows} of {length}"
        )
    dtype = compute_dtype(tokens.dtype)
    if isinstance(weights, CellPooling):
        return CellPooling(weights.cells, weights.first + first)  # of real tokens and cells alone
    if isinstance(weights, GridPooling):
        weights = weights._replace(first=weights.first + first)
        if token_mask is None and mask is None:
            return weights
        matrix = columns(weights, slice(0, n), tokens.new_empty(0, dtype=dtype))[:, 0]
    else:
        matrix = F.pad(weights.to(dtype), (first, n - first - length))
        matrix = matrix if matrix.ndim == 3 else matrix[None]
    if token_mask is not None:
        matrix = matrix.masked_fill(~token_mask[:, None], 0.0)
    return zero_rows(matrix[:, None], mask)[:, 0]


def check_cells(weights: CellPooling, tokens: Tensor) -> None:
    """Raise unless the cells are those of as many items as there are."""
    b, index = tokens.shape[0], weights.cells.cell
    if index.shape[0] != b or weights.first < 0:
        raise ValueError(
            f"token_weights must pool {b} items into cells, from a first token of at least 0, got "
            f"{index.shape[0]} items from {weights.first}"
        )
    check_device("token_weights", index, "tokens", tokens)


def columns(weights: TokenWeights, place: slice, like: Tensor) -> Tensor:
    """Pi over a range of tokens, ``(1 or B, 1, M, T)``, in the dtype and on the device of ``like``."""
    if isinstance(weights, Tensor):
        return weights[:, None, :, place].to(like.dtype)
    if isinstance(weights, CellPooling):
        (index, counts, _), first = weights
        m = counts.shape[1]
        position = torch.arange(place.start, place.stop, device=like.device) - first
        cell = (
            index[:, position.clamp(min=0)]
            if index.shape[1]
            else index.new_full((len(index), len(position)), m)
        )
        cell = cell.masked_fill(position < 0, m)  # (B, T)
        member = cell[:, None] == torch.arange(m, device=like.device)[:, None]  # (B, M, T)
        return (member.to(like.dtype) / counts.clamp(min=1)[..., None])[:, None]
    grid, cells, first = weights
    position = torch.arange(place.start, place.stop, device=like.device) - first
    inside = (position >= 0) & (position < math.prod(grid))
    rest = position.clamp(0, math.prod(grid) - 1)
    matrix = inside.to(like.dtype)[None]  # (1, T)
    after = math.prod(grid)
    for side, count in zip(grid, cells, strict=True):
        after //= side
        index = rest // after
        rest = rest - index * after
        along = averages(side, count, like)[:, index]  # (count, T)
        matrix = (matrix[:, None] * along).flatten(0, 1)
    return matrix[None, None]


def gram(weights: TokenWeights, like: Tensor) -> Tensor:
    """Pi Pi^T ``(1 or B, 1, M, M)`` in the dtype and on the device of ``like``."""
    if isinstance(weights, Tensor):
        matrix = weights.to(like.dtype)[:, None]
        return matrix @ matrix.mT
    if isinstance(weights, CellPooling):
        counts = weights.cells.counts
        return torch.diag_embed((counts > 0).to(like.dtype) / counts.clamp(min=1))[:, None]
    product = like.new_ones(1, 1)
    for side, count in zip(weights.grid_size, weights.cells, strict=True):
        matrix = averages(side, count, like)
        product = torch.kron(product, matrix @ matrix.mT)
    return product[None, None]


def spread(weights: TokenWeights, rows: Tensor, n: int) -> Tensor:
    """Pi^T ``rows``, what each of ``n`` tokens gets of ``(B, H, M, P)``; ``(B, H, n, P)``."""
    b, h, m, p = rows.shape
    if isinstance(weights, CellPooling):
        first = weights.first
        own = spread_from_cells(rows.transpose(1, 2).reshape(b, m, h * p), weights.cells)
        own = own.view(b, own.shape[1], h, p).transpose(1, 2)
        return F.pad(own, (0, 0, first, n - first - own.shape[2]))
    if isinstance(weights, Tensor):
        # Heads as channels: batched by heads, the product would keep a copy of the matrix for each.
        wide = rows.transpose(1, 2).reshape(b, m, h * p)
        return (weights.to(rows.dtype).mT @ wide).view(b, n, h, p).transpose(1, 2)
    grid, cells, first = weights
    wide = rows.transpose(1, 2).reshape(b, *cells, h * p)
    for axis, (side, count) in enumerate(zip(grid, cells, strict=True)):
        if side != count:
            matrix = averages(side, count, rows)
            wide = matrix.mT @ wide.reshape(b * math.prod(grid[:axis]), count, -1)
    length = math.prod(grid)
    return F.pad(wide.reshape(b, length, h, p).transpose(1, 2), (0, 0, first, n - first - length))


def spread_slice(weights: TokenWeights, rows: Tensor, n: int) -> Tensor:
    """:func:`spread` for the ``n`` tokens of one rank: a pooling is then of the grid of all ranks."""
    if not isinstance(weights, GridPooling):
        return spread(weights, rows, n)  # a matrix over the rank's tokens
    b, h, m, p = rows.shape
    slab = slab_of(weights.grid_size, weights.first, n)
    sides = slab.shape
    wide = rows.transpose(1, 2).reshape(b, m, h * p)
    for axis, (side, count) in enumerate(zip(weights.grid_size, weights.cells, strict=True)):
        matrix = averages(side, count, rows)
        if axis == 0:
            matrix = matrix[:, slab.rows]
        after = math.prod(weights.cells[axis + 1 :])
        wide = matrix.mT @ wide.reshape(b * math.prod(sides[:axis]), count, after * h * p)
    return slab.take(wide.reshape(b, *sides, h * p)).unflatten(-1, (h, p)).transpose(1, 2)


def check_slice(weights: TokenWeights, tokens: Tensor, m: int) -> TokenWeights:
    """Check Pi over the tokens of one rank ``(B, H, n, P)``, prefix tokens included, as pooling makes it."""
    if isinstance(weights, GridPooling):
        shape: tuple[int, ...] = (math.prod(weights.cells), tokens.shape[2])
    elif isinstance(weights, CellPooling):
        raise ValueError("token_weights must be a matrix or a pooling of a grid with parallel, got cells")
    else:
        check_floating("token_weights", weights)
        shape = tuple(weights.shape[-2:])
    if shape != (m, tokens.shape[2]):
        raise ValueError(
            f"token_weights must make {m} representatives of the rank's {tokens.shape[2]} tokens, prefix "
            f"tokens included, got {shape[0]} of {shape[1]}"
        )
    return weights if isinstance(weights, GridPooling) or weights.ndim == 3 else weights[None]
