"""The contraction and its derivative on representatives alone, for implementations without autograd.

Everything here is of size M x P or smaller per head; rows that do not exist are zero and stay zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cbsa_torch._core.precision import solve_dtype
from cbsa_torch.ops.cbsa.reference import contract_exact, contract_softmax, exact_system
from cbsa_torch.ops.definite import cholesky
from cbsa_torch.ops.masking import zero_rows


def contract(rep: Tensor, kind: str, scale: float, eps: float, mask: Tensor | None) -> Tensor:
    """C of Eq. 7 (``"exact"``) or Eq. 8 (``"softmax"``), or ``rep`` itself (``"none"``).

    Args:
        rep: ``(B, H, M, P)``.
        kind: the contraction.
        scale: factor on the logits of Eq. 8.
        eps: epsilon of Eq. 7.
        mask: ``(B, M)`` bool, True = exists.
    """
    if kind == "softmax":
        return zero_rows(contract_softmax(rep, scale, mask)[1], mask)
    return contract_exact(rep, eps, mask) if kind == "exact" else rep


def linearized(
    rep: Tensor, kind: str, scale: float, eps: float, mask: Tensor | None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """:func:`contract`, and what makes the gradient with respect to ``rep`` from that of C."""
    if kind == "none":
        return rep, lambda gradient: zero_rows(gradient, mask)
    if kind == "softmax":
        p, c = contract_softmax(rep, scale, mask)

        def softmax_backward(gradient: Tensor) -> Tensor:
            gradient = zero_rows(gradient, mask)
            dp = gradient @ rep.mT
            dg = p * (dp - (p * dp).sum(-1, keepdim=True))
            return zero_rows(p.mT @ gradient + (scale * (dg + dg.mT)) @ rep, mask)

        return zero_rows(c, mask), softmax_backward

    wide = rep.to(solve_dtype(rep))
    matrix, alpha, by_channels = exact_system(wide, eps, mask)
    factor = cholesky(matrix)

    def solve(rows: Tensor) -> Tensor:
        return torch.cholesky_solve(rows.mT, factor).mT if by_channels else torch.cholesky_solve(rows, factor)

    c = solve(wide)

    def exact_backward(gradient: Tensor) -> Tensor:
        y = solve(zero_rows(gradient, mask).to(wide.dtype))
        if by_channels:  # C = Rep G^-1 with G = I + alpha Rep^T Rep; dG = alpha (dRep^T Rep + Rep^T dRep)
            h = c.mT @ y
            result = y - alpha * (wide @ (h + h.mT))
        else:  # C = G^-1 Rep with G = I + alpha Rep Rep^T
            e = y @ c.mT
            result = y - alpha * ((e + e.mT) @ wide)
        return zero_rows(result.to(rep.dtype), mask)

    return c.to(rep.dtype), exact_backward
