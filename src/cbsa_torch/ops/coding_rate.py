"""Coding rate (Eq. 1), the compression term built from it (Eq. 2), and the rate reduction."""

from __future__ import annotations

import torch
from torch import Tensor

from cbsa_torch._core.checks import check_floating, check_mask, check_positive
from cbsa_torch._core.precision import compute_dtype, no_autocast, solve_dtype
from cbsa_torch._core.types import DEFAULT_EPS
from cbsa_torch.ops.definite import cholesky


def coding_rate(
    x: Tensor, *, eps: float = DEFAULT_EPS, normalize: bool = False, token_mask: Tensor | None = None
) -> Tensor:
    """Coding rate R(X) = 1/2 logdet(I + q / (N eps^2) X X^T) of each set of N vectors in R^q (Eq. 1).

    Nats needed to code the vectors up to precision ``eps``: large when they fill the space, small when
    they lie near a low-dimensional subspace. The determinant is taken on the smaller side (N or q), by
    Cholesky, in float64 where the device has it. Its absolute error is about 1e-16 times the energy
    q / (N eps^2) ||X||^2; from about 1e16 on, the identity is lost in rounding and the result is NaN.

    Args:
        x: ``(..., N, q)`` vectors as rows. Leading axes are kept, so ``(B, H, N, P)`` gives the rate of
            every head of every item.
        eps: quantisation precision epsilon.
        normalize: scale every vector to unit norm first (a zero vector stays zero).
        token_mask: ``(B, N)`` bool with B the first axis of ``x``, True = a real vector; the others
            neither count in N nor in the sum. An item without any has rate 0.

    Returns:
        ``(...,)``, in nats; float32 for low-precision inputs, else the dtype of ``x``.

    Raises:
        ValueError: no vectors, a mask that does not fit, ``eps`` not positive. TypeError: wrong dtypes.

    Examples:
        >>> from cbsa_torch.ops import coding_rate
        >>> coding_rate(torch.eye(4))  # four directions: 1/2 log(1 + 4 / (4 * 0.1^2)) each
        tensor(9.2302)
        >>> coding_rate(torch.ones(4, 4))  # four times the same one
        tensor(3.6892)
    """
    check_floating("x", x)
    check_positive("eps", eps)
    if x.ndim < 2 or 0 in x.shape:
        raise ValueError(f"x must have shape (..., N, q) with at least one vector, got {tuple(x.shape)}")
    result_dtype = compute_dtype(x.dtype)
    n, q = x.shape[-2:]
    with no_autocast(x):
        x = x.to(solve_dtype(x))
        count: Tensor | int = n
        if token_mask is not None:
            if x.ndim < 3:
                raise ValueError(f"x must have a batch axis when token_mask is given, got {tuple(x.shape)}")
            check_mask("token_mask", token_mask, (x.shape[0], n), "(B, N)", "a real token", ("x", x))
            ones = (1,) * (x.ndim - 3)
            x = x.masked_fill(~token_mask.view(-1, *ones, n, 1), 0.0)
            count = token_mask.sum(-1).clamp(min=1).to(x.dtype).view(-1, *ones, 1, 1)
        if normalize:
            x = torch.nn.functional.normalize(x, dim=-1)
        scaled = x * (q / (count * eps**2))
        # logdet is the same on both sides
        rate = rate_of_gram(x.mT @ scaled if q <= n else x @ scaled.mT)
    return rate.to(result_dtype)


def rate_of_gram(gram: Tensor) -> Tensor:
    """1/2 logdet(I + G) of ``(..., q, q)`` Gram matrices G, scaled already; NaN where the identity is lost."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # 1/2 logdet = sum of the logs of the Cholesky diagonal
    return cholesky(identity + gram).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def compression_rate(
    projected: Tensor, *, eps: float = DEFAULT_EPS, normalize: bool = False, token_mask: Tensor | None = None
) -> Tensor:
    """Compression term R^c(Z | U) = sum over subspaces k of R(U_k^T Z) (Eq. 2).

    Args:
        projected: ``(..., H, N, P)`` tokens in each subspace, U_k^T Z.
        eps, normalize, token_mask: as in :func:`coding_rate`.

    Returns:
        ``(...,)``, one number per item, in nats. The terms per head are ``coding_rate(projected)``.

    Raises:
        ValueError: a shape or mask that does not fit, ``eps`` not positive. TypeError: wrong dtypes.

    Examples:
        >>> from cbsa_torch.ops import compression_rate
        >>> projected = torch.stack([torch.eye(4), torch.zeros(4, 4)])  # the second head sees nothing
        >>> compression_rate(projected)
        tensor(9.2302)
    """
    check_floating("projected", projected)
    if projected.ndim < 3 or 0 in projected.shape:
        raise ValueError(
            f"projected must have shape (..., H, N, P) with at least one vector, got {tuple(projected.shape)}"
        )
    if token_mask is not None and projected.ndim < 4:
        raise ValueError(
            f"projected must have a batch axis when token_mask is given, got {tuple(projected.shape)}"
        )
    return coding_rate(projected, eps=eps, normalize=normalize, token_mask=token_mask).sum(-1)


def rate_reduction(
    tokens: Tensor,
    projected: Tensor,
    *,
    eps: float = DEFAULT_EPS,
    normalize: bool = False,
    token_mask: Tensor | None = None,
) -> Tensor:
    """Rate reduction R(Z) - R^c(Z | U): the objective (2) without its sparsity term.

    Args:
        tokens: ``(..., N, D)`` tokens Z in the model's space.
        projected: ``(..., H, N, P)`` the same tokens in each subspace.
        eps, normalize, token_mask: as in :func:`coding_rate`.

    Returns:
        ``(...,)``, one number per item, in nats.

    Raises:
        ValueError: leading axes or N of ``tokens`` and ``projected`` that differ, a mask that does not fit,
            ``eps`` not positive. TypeError: wrong dtypes.

    Examples:
        >>> from cbsa_torch.ops import rate_reduction
        >>> tokens = torch.eye(4)  # the first two lie in one subspace, the others in another
        >>> rate_reduction(tokens, torch.stack([tokens[:, :2], tokens[:, 2:]]))
        tensor(1.3666)
    """
    check_floating("tokens", tokens)
    check_floating("projected", projected)
    if tokens.ndim < 2 or tokens.shape[:-2] != projected.shape[:-3] or tokens.shape[-2] != projected.shape[-2]:
        raise ValueError(
            "tokens must have shape (..., N, D) and projected (..., H, N, P) with the same leading axes and N, "
            f"got {tuple(tokens.shape)} and {tuple(projected.shape)}"
        )
    expansion = coding_rate(tokens, eps=eps, normalize=normalize, token_mask=token_mask)
    return expansion - compression_rate(projected, eps=eps, normalize=normalize, token_mask=token_mask)
