"""Linear systems of symmetric positive definite matrices; NaN where there is no solution."""

from __future__ import annotations

import torch
from torch import Tensor


def cholesky(matrix: Tensor) -> Tensor:
    """The factor L of matrices L L^T, ``(..., P, P)``; NaN for one that is not definite."""
    # cholesky_ex does not raise: non-finite input comes out as NaN, as it does everywhere else.
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return factor.masked_fill((failed != 0)[..., None, None], float("nan"))


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """A^-1 R of ``(..., P, P)`` and ``(..., P, K)``; NaN for a matrix that is not definite."""
    if has_no_factorisation():
        return eliminated(matrix) @ right
    return torch.cholesky_solve(right, cholesky(matrix))


def inverse(matrix: Tensor) -> Tensor:
    """A^-1 of ``(..., P, P)``; NaN for a matrix that is not definite."""
    if has_no_factorisation():
        return eliminated(matrix)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.cholesky_solve(identity.expand_as(matrix), cholesky(matrix))


def has_no_factorisation() -> bool:
    """Whether what is computed becomes an ONNX graph: ONNX has no operator that factors a matrix."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def eliminated(matrix: Tensor) -> Tensor:
    """:func:`inverse` by Gauss-Jordan elimination in place, of products and a loop alone (in ONNX a ``Scan``).

    Without pivoting, which definite matrices do not need: the pivots are positive, and no entry grows. Step k
    divides row k by the pivot and takes its multiples from the other rows; column k is then one of the inverse.
    """
    from torch._higher_order_ops.scan import scan  # brings the compiler along, which an export has loaded

    def step(rows: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        unit = unit[:, None]  # e_k, (P, 1)
        keep = 1 - unit
        row, column = unit.mT @ rows, rows @ unit  # (..., 1, P), (..., P, 1)
        pivot = row @ unit  # (..., 1, 1)
        row = (row * keep.mT + unit.mT) / pivot
        return rows * (keep * keep.mT) + (unit - column * keep) @ row, pivot[..., 0]

    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    result, pivots = scan(step, matrix, identity, dim=0)  # pivots (P, ..., 1)
    definite: Tensor = (pivots > 0).all(0)[..., None]
    return result.masked_fill(~definite, float("nan"))
