"""Pi, the weights by which tokens make up a first guess of the representatives: its transpose, and its norm.

Pi is a matrix ``(M, n)``, one per item ``(B, M, n)``, or average pooling of a grid, whose matrix is the
Kronecker product of one small matrix per axis and is not written out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cbsa_torch._core.checks import check_device, check_floating
from cbsa_torch._core.types import GridPooling
from cbsa_torch.ops.masking import zero_rows
from cbsa_torch.ops.pooling import window_members

TokenWeights = Tensor | GridPooling


def check_token_weights(weights: TokenWeights, tokens: Tensor, m: int, first: int) -> None:
    """Raise unless Pi has ``m`` rows and is over tokens of ``(B, H, N, P)`` from index ``first`` on."""
    n = tokens.shape[2]
    if isinstance(weights, GridPooling):
        rows, columns = math.prod(weights.cells), math.prod(weights.grid_size)
    else:
        check_floating("token_weights", weights)
        check_device("token_weights", weights, "tokens", tokens)
        if weights.ndim not in (2, 3) or (weights.ndim == 3 and weights.shape[0] != tokens.shape[0]):
            raise ValueError(
                f"token_weights must have shape (M, N) or (B, M, N) with B={tokens.shape[0]}, "
                f"got {tuple(weights.shape)}"
            )
        rows, columns = weights.shape[-2:]
    if rows != m or columns > n - first:
        raise ValueError(
            f"token_weights must make {m} representatives of at most {n - first} tokens (N less the prefix "
            f"tokens), got {rows} of {columns}"
        )


def spread(weights: TokenWeights, rows: Tensor, n: int, first: int) -> Tensor:
    """Pi^T ``rows``: what every token gets of what is given to the representatives.

    Args:
        weights: Pi.
        rows: ``(B, H, M, P)``.
        n: tokens in all.
        first: tokens before those that Pi is over.

    Returns:
        ``(B, H, n, P)``, zero for tokens that Pi is not over.
    """
    if isinstance(weights, GridPooling):
        spread = _spread_over_grid(weights, rows)
    else:
        weights = weights.to(rows.dtype)
        spread = (weights if weights.ndim == 2 else weights[:, None]).mT @ rows
    return F.pad(spread, (0, 0, first, n - first - spread.shape[2]))


def _spread_over_grid(pooling: GridPooling, rows: Tensor) -> Tensor:
    b, h, _, p = rows.shape
    grid, cells = pooling
    spread = rows.transpose(1, 2).reshape(b, *cells, h * p)
    for axis, (side, count) in enumerate(zip(grid, cells, strict=True)):
        if side != count:
            matrix = _average(side, count, rows)
            spread = matrix.mT @ spread.reshape(b * math.prod(grid[:axis]), count, -1)
    return spread.reshape(b, math.prod(grid), h, p).transpose(1, 2)


def dense(weights: TokenWeights, like: Tensor, mask: Tensor | None, n: int, first: int) -> Tensor:
    """Pi as ``(1 or B, 1, M, n)`` in the dtype of ``like``, with zeros for what does not exist."""
    if isinstance(weights, GridPooling):
        identity = torch.eye(math.prod(weights.cells), dtype=like.dtype, device=like.device)[None, None]
        matrix = spread(weights, identity, n, first).mT
    else:
        matrix = weights.to(like.dtype)
        matrix = F.pad(matrix, (first, n - first - matrix.shape[-1]))
        matrix = matrix[None, None] if matrix.ndim == 2 else matrix[:, None]
    return zero_rows(matrix, mask)


def norm_bound(weights: TokenWeights, like: Tensor, mask: Tensor | None) -> Tensor:
    """A bound of the spectral norm of Pi, ``(1 or B, 1)`` in the dtype of ``like``.

    It is the root of the largest sum of a row times that of a column, of absolute values. That of a Kronecker
    product is the product of those of its factors; where cells do not overlap it is the norm itself.
    """
    if isinstance(weights, GridPooling):
        bound = like.new_ones(1, 1)
        for side, count in zip(*weights, strict=True):
            if side != count:
                bound = bound * _root_of_sums(_average(side, count, like))
        return bound
    matrix = weights.to(like.dtype)
    matrix = matrix[None, None] if matrix.ndim == 2 else matrix[:, None]
    return _root_of_sums(zero_rows(matrix, mask))


def _root_of_sums(matrix: Tensor) -> Tensor:
    sizes = matrix.abs()
    return (sizes.sum(-1).amax(-1) * sizes.sum(-2).amax(-1)).sqrt()


def _average(side: int, count: int, like: Tensor) -> Tensor:
    """Average pooling of one axis as a matrix ``(count, side)``."""
    member = window_members(side, count, like.device).to(like.dtype)
    return member / member.sum(1, keepdim=True)
