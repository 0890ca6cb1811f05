"""The contraction and its derivative on representatives alone, for implementations without autograd.

Everything here is of size M x P or smaller per head; rows that do not exist are zero and stay zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cbsa_torch._core.precision import solve_dtype
from cbsa_torch.ops.cbsa.reference import contract_exact, contract_softmax, exact_system
from cbsa_torch.ops.masking import masked_softmax, zero_rows


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


def contract_backward(
    gradient: Tensor, rep: Tensor, kind: str, scale: float, eps: float, mask: Tensor | None
) -> Tensor:
    """The gradient with respect to ``rep`` from that of C."""
    gradient = zero_rows(gradient, mask)
    if kind == "none":
        return gradient
    if kind == "softmax":
        p = masked_softmax(scale * (rep @ rep.mT), None if mask is None else mask[:, None, None, :])
        dp = gradient @ rep.mT
        dg = p * (dp - (p * dp).sum(-1, keepdim=True))
        return zero_rows(p.mT @ gradient + scale * (dg + dg.mT) @ rep, mask)
    wide, dc = rep.to(solve_dtype(rep)), gradient.to(solve_dtype(rep))
    factor, alpha, by_channels = exact_system(wide, eps, mask)
    if by_channels:  # C = Rep G^-1 with G = I + alpha Rep^T Rep; dG = alpha (dRep^T Rep + Rep^T dRep)
        c, y = (torch.cholesky_solve(t.mT, factor).mT for t in (wide, dc))
        h = c.mT @ y
        result = y - alpha * (wide @ (h + h.mT))
    else:  # C = G^-1 Rep with G = I + alpha Rep Rep^T
        c, y = (torch.cholesky_solve(t, factor) for t in (wide, dc))
        e = y @ c.mT
        result = y - alpha * ((e + e.mT) @ wide)
    return zero_rows(result.to(rep.dtype), mask)
