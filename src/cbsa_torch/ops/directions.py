"""Directions as representatives: principal ones (Eq. 12), or a fixed orthonormal basis (Eq. 13).

Their attention is not a softmax: a direction b_j represents the tokens by how far each reaches along it,
A_j = W b_j / |W b_j|, and stands for them as |W b_j| b_j. Pass both on to
:func:`cbsa_torch.ops.contract_and_broadcast`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cbsa_torch._core.checks import check_device, check_floating
from cbsa_torch._core.precision import compute_dtype, no_autocast, solve_dtype
from cbsa_torch._core.types import Representatives
from cbsa_torch.ops.masking import check_tokens, real_tokens
from cbsa_torch.ops.spectral import eigh

_ORTHONORMAL = 1e-3
"""Largest |B^T B - I| of a basis; half precision rounds to about this."""


NULL_REACH = 1e4
"""Times eps of the longest reach: what tokens reach along a direction, to be more than rounding."""


def principal_directions(tokens: Tensor, *, token_mask: Tensor | None = None) -> Representatives:
    """Principal directions as representatives: SVD U_k^T Z = L Sigma R^T, U_k^T Q = L Sigma, A = R.

    With the exact contraction this is linear attention (12). The signs of the directions are arbitrary: with
    the exact contraction, or none, they cancel; the softmax contraction (8) depends on them.

    The SVD is taken by an eigendecomposition of the P x P Gram matrix. Its gradient exists where the
    eigenvalues are distinct (hence N >= P); :func:`cbsa_torch.ops.linear_cbsa` has no such restriction.

    Args:
        tokens: ``(B, H, N, P)`` tokens in each subspace.
        token_mask: ``(B, N)`` bool, True = a real token.

    Returns:
        P representatives with their attention: values ``(B, H, P, P)``, attention ``(B, H, P, N)``. A
        direction without energy gets zeros.

    Raises:
        ValueError: shapes that do not fit. TypeError: wrong dtypes.

    Examples:
        >>> from cbsa_torch.ops import principal_directions
        >>> directions = principal_directions(torch.randn(1, 2, 30, 8))
        >>> directions.values.shape, directions.attention.shape
        (torch.Size([1, 2, 8, 8]), torch.Size([1, 2, 8, 30]))
    """
    check_tokens(tokens, token_mask)
    with no_autocast(tokens):
        w, _ = real_tokens(tokens, token_mask, solve_dtype(tokens))
        _, directions = eigh(w.mT @ w)  # (B, H, P, P), columns
        # Along a null direction rounding leaves a reach of a few eps of the longest: noise, not tokens.
        return _along(w, directions, tokens.dtype, (NULL_REACH * torch.finfo(w.dtype).eps) ** 2)


def basis_directions(
    tokens: Tensor, basis: Tensor | None = None, *, token_mask: Tensor | None = None
) -> Representatives:
    """A fixed orthonormal basis as representatives: with the exact contraction, channel attention (13).

    Args:
        tokens: ``(B, H, N, P)`` tokens in each subspace.
        basis: ``(P, P)`` or ``(H, P, P)``, orthonormal columns (not checked here: that would read the
            values). Default: the identity.
        token_mask: ``(B, N)`` bool, True = a real token.

    Returns:
        P representatives with their attention: values ``(B, H, P, P)``, attention ``(B, H, P, N)``. A
        direction without energy gets zeros.

    Raises:
        ValueError: shapes that do not fit. TypeError: wrong dtypes.

    Examples:
        >>> from cbsa_torch.ops import basis_directions
        >>> directions = basis_directions(torch.randn(1, 2, 30, 8))
        >>> directions.values.shape, directions.attention.shape
        (torch.Size([1, 2, 8, 8]), torch.Size([1, 2, 8, 30]))
    """
    check_tokens(tokens, token_mask)
    with no_autocast(tokens):
        w, _ = real_tokens(tokens, token_mask, compute_dtype(tokens.dtype))
        if basis is None:
            basis = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
        else:
            check_basis(basis, tokens)
        return _along(w, basis.to(w.dtype), tokens.dtype)


def check_basis(basis: Tensor, tokens: Tensor) -> None:
    """Raise unless ``basis`` has a shape and device that fit ``(B, H, N, P)`` tokens."""
    check_floating("basis", basis)
    h, p = tokens.shape[1], tokens.shape[3]
    if tuple(basis.shape) not in ((p, p), (h, p, p)):
        raise ValueError(
            f"basis must have shape (P, P) or (H, P, P) for H={h}, P={p}, got {tuple(basis.shape)}"
        )
    check_device("basis", basis, "tokens", tokens)


def check_orthonormal(basis: Tensor) -> None:
    """Raise ``ValueError`` unless ``basis`` is ``(..., P, P)`` with orthonormal columns. Reads the values."""
    check_floating("basis", basis)
    if basis.ndim not in (2, 3) or basis.shape[-1] != basis.shape[-2]:
        raise ValueError(f"basis must have shape (P, P) or (H, P, P), got {tuple(basis.shape)}")
    full = basis.detach().to("cpu", torch.float64)
    deviation = (full.mT @ full - torch.eye(full.shape[-1], dtype=full.dtype)).abs().max().item()
    if not deviation <= _ORTHONORMAL:
        raise ValueError(
            f"basis must have orthonormal columns, such as torch.linalg.qr(basis).Q; B^T B differs from I by "
            f"{deviation:.3g}"
        )


def _along(w: Tensor, directions: Tensor, dtype: torch.dtype, floor: float = 0.0) -> Representatives:
    """Representatives along the columns of ``directions`` ``([B,] [H,] P, P)``, with their attention.

    Directions with at most ``floor`` times the largest energy are taken for empty.
    """
    reach = w @ directions  # (B, H, N, P)
    energy = reach.square().sum(-2)  # (B, H, P)
    empty = energy <= floor * energy.amax(-1, keepdim=True)
    safe = energy.masked_fill(empty, 1.0)  # the root of zero has no gradient
    length = safe.sqrt().masked_fill(empty, 0.0)
    inverse = safe.rsqrt().masked_fill(empty, 0.0)
    values, attention = length[..., None] * directions.mT, inverse[..., None] * reach.mT
    return Representatives(values.to(dtype), attention=attention.to(dtype))
