"""The contraction and its derivative on representatives alone, for implementations without autograd.

Everything here is of size M x P or smaller per head; rows that do not exist are zero and stay zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cbsa_torch._core.precision import solve_dtype
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
    if kind == "none":
        return rep
    if kind == "softmax":
        return zero_rows(_attention(rep, scale, mask) @ rep, mask)
    wide = rep.to(solve_dtype(rep))
    factor, small = _factor(wide, eps, mask)
    solved = torch.cholesky_solve(wide.mT if small else wide, factor)
    return (solved.mT if small else solved).to(rep.dtype)


def contract_backward(
    gradient: Tensor, rep: Tensor, kind: str, scale: float, eps: float, mask: Tensor | None
) -> Tensor:
    """The gradient with respect to ``rep`` from that of C."""
    gradient = zero_rows(gradient, mask)
    if kind == "none":
        return gradient
    if kind == "softmax":
        p = _attention(rep, scale, mask)
        dp = gradient @ rep.mT
        dg = p * (dp - (p * dp).sum(-1, keepdim=True))
        return zero_rows(p.mT @ gradient + scale * (dg + dg.mT) @ rep, mask)
    wide, dc = rep.to(solve_dtype(rep)), gradient.to(solve_dtype(rep))
    alpha = _alpha(wide, eps, mask)
    factor, small = _factor(wide, eps, mask)
    if small:  # C = Rep G^-1 with G = I + alpha Rep^T Rep; dG = alpha (dRep^T Rep + Rep^T dRep)
        c, y = (torch.cholesky_solve(t.mT, factor).mT for t in (wide, dc))
        h = c.mT @ y
        result = y - alpha * (wide @ (h + h.mT))
    else:  # C = G^-1 Rep with G = I + alpha Rep Rep^T
        c, y = (torch.cholesky_solve(t, factor) for t in (wide, dc))
        e = y @ c.mT
        result = y - alpha * ((e + e.mT) @ wide)
    return zero_rows(result.to(rep.dtype), mask)


def _attention(rep: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    return masked_softmax(scale * (rep @ rep.mT), None if mask is None else mask[:, None, None, :])


def _alpha(rep: Tensor, eps: float, mask: Tensor | None) -> Tensor | float:
    """P / (M eps^2), with M the number of representatives that exist."""
    if mask is None:
        return rep.shape[-1] / (rep.shape[-2] * eps**2)
    count = mask.sum(-1).clamp(min=1).to(rep.dtype)[:, None, None, None]
    return rep.shape[-1] / (count * eps**2)


def _factor(rep: Tensor, eps: float, mask: Tensor | None) -> tuple[Tensor, bool]:
    """Cholesky factor of I + alpha Rep^T Rep (True), or of I + alpha Rep Rep^T where that is smaller."""
    m, p = rep.shape[-2:]
    small = p <= m
    scaled = _alpha(rep, eps, mask) * rep
    gram = rep.mT @ scaled if small else rep @ scaled.mT
    identity = torch.eye(min(m, p), dtype=rep.dtype, device=rep.device)
    factor, failed = torch.linalg.cholesky_ex(identity + gram)
    return factor.masked_fill((failed != 0)[..., None, None], float("nan")), small
