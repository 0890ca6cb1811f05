"""Channel attention: Eq. 13, and the token statistics self-attention (TSSA) that ToST trains.

Both scale every channel by a decreasing function of its second moment over the tokens; nothing compares
one token with another. O(N P) per head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cbsa_torch._core.checks import check_per_head, check_positive
from cbsa_torch._core.precision import compute_dtype, no_autocast
from cbsa_torch._core.types import DEFAULT_EPS
from cbsa_torch.ops.directions import check_basis
from cbsa_torch.ops.masking import check_tokens, real_tokens
from cbsa_torch.ops.parallel import ContextParallel, total

NORM_FLOOR = 1e-12
"""Smallest norm of a channel over the tokens, as in torch's ``normalize``."""
MEMBERSHIP_FLOOR = 1e-8
"""Added to a head's summed memberships, as in the official code."""


def channel_attention(
    tokens: Tensor,
    basis: Tensor | None = None,
    *,
    eps: float = DEFAULT_EPS,
    average: bool = False,
    token_mask: Tensor | None = None,
    parallel: ContextParallel | None = None,
) -> Tensor:
    """Channel attention W B diag(f(|W b_j|^2)) B^T with f(lambda) = eps^2 / (eps^2 + lambda) (Eq. 13).

    CBSA whose representatives lie along a fixed orthonormal basis B, with the exact contraction (7).

    Args:
        tokens: ``(B, H, N, P)`` tokens in each subspace, U_k^T Z.
        basis: ``(P, P)`` or ``(H, P, P)``, orthonormal columns b_j (not checked). Default: the identity.
        eps: quantisation precision epsilon.
        average: use the mean over tokens in place of the sum |W b_j|^2, i.e. N eps^2 in place of eps^2.
        token_mask: ``(B, N)`` bool, True = a real token. The others are ignored, whatever they hold, and
            get zeros.
        parallel: who has the other tokens, if they are spread over processes; see :mod:`cbsa_torch.parallel`.

    Returns:
        ``(B, H, N, P)`` in the dtype of ``tokens``, computed in float32 or better.

    Raises:
        ValueError: shapes that do not fit. TypeError: wrong dtypes.

    Examples:
        >>> from cbsa_torch.ops import channel_attention
        >>> channel_attention(torch.eye(2).view(1, 1, 2, 2), eps=1.0)  # f(1) = 1 / (1 + 1) in every channel
        tensor([[[[0.5000, 0.0000],
                  [0.0000, 0.5000]]]])
    """
    check_positive("eps", eps)
    check_tokens(tokens, token_mask, parallel)
    with no_autocast(tokens):
        w, count = real_tokens(tokens, token_mask, compute_dtype(tokens.dtype), parallel)
        if basis is not None:
            check_basis(basis, tokens)
            basis = basis.to(w.dtype)
            w = w @ basis
        # lambda / eps^2; of w / eps, for eps^2 may leave the range of float32.
        energy = (w / eps).square().sum(-2, keepdim=True)  # (B, H, 1, P)
        if parallel is not None:
            energy = total(energy, parallel.group)
        w = w / (1 + (energy / count if average else energy))
        return (w if basis is None else w @ basis.mT).to(tokens.dtype)


def tssa(
    tokens: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    token_mask: Tensor | None = None,
    parallel: ContextParallel | None = None,
) -> Tensor:
    """Token Statistics Self-Attention (Wu et al., ICLR 2025), as its authors train it.

    Each token belongs to the heads by a softmax over heads, Pi = softmax_k(temperature_k |w_kn|^2) with
    every channel normalised over the tokens; a head damps its channels by their mean square weighted by Pi:
    output - Pi * W / (1 + sum_n Pi_n W_n^2 / sum_n Pi_n). At temperature 0 this is
    ``-channel_attention(tokens, eps=1, average=True) / H``: Eq. 13 up to the sign, which the output
    projection absorbs.

    Args:
        tokens: ``(B, H, N, P)`` tokens in each subspace, U_k^T Z.
        temperature: of the softmax over heads: a number or ``(H,)``.
        token_mask: ``(B, N)`` bool, True = a real token. The others are ignored, whatever they hold, and
            get zeros.
        parallel: who has the other tokens, if they are spread over processes; see :mod:`cbsa_torch.parallel`.

    Returns:
        ``(B, H, N, P)`` in the dtype of ``tokens``, computed in float32 or better.

    Raises:
        ValueError: shapes that do not fit. TypeError: wrong dtypes.

    Examples:
        >>> from cbsa_torch.ops import tssa
        >>> tssa(torch.randn(2, 4, 196, 16)).shape
        torch.Size([2, 4, 196, 16])
    """
    check_tokens(tokens, token_mask, parallel)
    check_per_head("temperature", temperature, "tokens", tokens)
    with no_autocast(tokens):
        w, _ = real_tokens(tokens, token_mask, compute_dtype(tokens.dtype))
        squares = w.square()  # (B, H, N, P)
        energy = squares.sum(-2, keepdim=True)
        if parallel is not None:
            energy = total(energy, parallel.group)
        membership = memberships(squares, energy, temperature, token_mask)  # (B, H, N)
        if parallel is None:
            moment = _shares(membership)[..., None, :] @ squares  # (B, H, 1, P)
        else:
            sums = torch.cat([membership[..., None, :] @ squares, membership.sum(-1)[..., None, None]], -1)
            sums = total(sums, parallel.group)
            moment = sums[..., :-1] / (sums[..., -1:] + MEMBERSHIP_FLOOR)
        return (-w * membership[..., None] / (1 + moment)).to(tokens.dtype)


def tssa_memberships(
    tokens: Tensor, temperature: Tensor | float = 1.0, token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Pi of :func:`tssa`, and Pi over its sum over the tokens: the weights of a head's mean square.

    Arguments as those of :func:`tssa`, unchecked; both results are ``(B, H, N)``, zero at masked tokens.
    """
    with no_autocast(tokens):
        w, _ = real_tokens(tokens, token_mask, compute_dtype(tokens.dtype))
        squares = w.square()
        membership = memberships(squares, squares.sum(-2, keepdim=True), temperature, token_mask)
        return membership, _shares(membership)


def memberships(
    squares: Tensor, energy: Tensor, temperature: Tensor | float, token_mask: Tensor | None = None
) -> Tensor:
    """Pi of :func:`tssa`, ``(B, H, N)``, from W^2 ``(B, H, N, P)`` and its sum over tokens ``(B, H, 1, P)``."""
    if isinstance(temperature, Tensor):
        temperature = temperature.to(squares.dtype)[:, None]  # (H, 1)
    share = squares / energy.clamp(min=NORM_FLOOR**2)
    membership = torch.softmax(temperature * share.sum(-1), dim=1)  # (B, H, N)
    return membership if token_mask is None else membership.masked_fill(~token_mask[:, None, :], 0.0)


def _shares(membership: Tensor) -> Tensor:
    return membership / (membership.sum(-1, keepdim=True) + MEMBERSHIP_FLOOR)
