"""Linear attention as CBSA with principal directions as representatives (Eq. 12).

With W = U_k^T Z (rows are tokens) and f(lambda) = eps^2 / (eps^2 + lambda), the output is W f(W^T W): a
spectral filter that keeps what is small beside eps and removes what is large.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cbsa_torch._core.checks import check_choice, check_positive
from cbsa_torch._core.precision import no_autocast, solve_dtype
from cbsa_torch._core.types import DEFAULT_EPS, LINEAR_SOLVERS, LinearSolver
from cbsa_torch.ops.definite import inverse
from cbsa_torch.ops.masking import check_tokens, real_tokens
from cbsa_torch.ops.parallel import ContextParallel, total
from cbsa_torch.ops.spectral import eigh


def linear_cbsa(
    tokens: Tensor,
    *,
    eps: float = DEFAULT_EPS,
    average: bool = False,
    solver: LinearSolver = "cholesky",
    token_mask: Tensor | None = None,
    parallel: ContextParallel | None = None,
) -> Tensor:
    """Linear attention W (I + W^T W / eps^2)^-1 inside each head's subspace (Eq. 12). O(N).

    CBSA whose representatives are the principal directions of the tokens, or any rotation among them, with
    the exact contraction (7) and M = P. Other orthogonal sets give the same form (Appendix B), but another
    filter: scaled by Lambda, Lambda^2 eps^2 / (eps^2 + Lambda^2 lambda).

    Args:
        tokens: ``(B, H, N, P)`` tokens in each subspace, U_k^T Z.
        eps: quantisation precision epsilon.
        average: use the mean of the tokens' outer products in place of their sum W^T W, i.e. N eps^2 in
            place of eps^2, so that the filter does not depend on how many tokens there are.
        solver: ``"cholesky"``, a linear solve of the P x P system, or ``"eigh"``, its eigendecomposition:
            the same value and gradient (also for repeated eigenvalues), slower for few tokens
            (``benchmarks/linear_cbsa.py``).
        token_mask: ``(B, N)`` bool, True = a real token. The others are ignored, whatever they hold, and
            get zeros.
        parallel: who has the other tokens, if they are spread over processes; see :mod:`cbsa_torch.parallel`.

    Returns:
        ``(B, H, N, P)`` in the dtype of ``tokens``; computed in float64 where the device has it. From a
        condition number 1 + lambda_max / eps^2 of about 1e16 on, the identity is lost in rounding: where W^T W
        is singular the result is then wrong, or NaN.

    Raises:
        ValueError: shapes or options that do not fit. TypeError: wrong dtypes.

    Examples:
        >>> from cbsa_torch.ops import linear_cbsa
        >>> linear_cbsa(torch.eye(2).view(1, 1, 2, 2), eps=1.0)  # I (I + I)^-1
        tensor([[[[0.5000, 0.0000],
                  [0.0000, 0.5000]]]])
    """
    check_choice("solver", solver, LINEAR_SOLVERS)
    check_positive("eps", eps)
    check_tokens(tokens, token_mask, parallel)
    with no_autocast(tokens):
        w, count = real_tokens(tokens, token_mask, solve_dtype(tokens), parallel)
        gram = w.mT @ w / eps**2  # (B, H, P, P)
        if parallel is not None:
            gram = total(gram, parallel.group)
        if average:
            gram = gram / count
        return (w @ spectral_filter(gram, solver)).to(tokens.dtype)


def spectral_filter(gram: Tensor, solver: LinearSolver) -> Tensor:
    """(I + G)^-1 of G = W^T W / eps^2, ``(B, H, P, P)``."""
    if solver == "eigh":
        return _SpectralFilter.apply(gram)
    return inverse(gram + torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))


class _SpectralFilter(torch.autograd.Function):
    """(I + G)^-1 = L diag(1 / (1 + lambda)) L^T for a symmetric G with eigenvalues lambda.

    The derivative of a spectral function takes divided differences of f at pairs of eigenvalues
    (Daleckii and Krein), where autograd divides by their difference and fails for repeated ones. For
    f = 1 / (1 + lambda) they are -f_i f_j: no division at all, and dG = -F dF F.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(gram: Tensor) -> Tensor:
        eigenvalues, eigenvectors = eigh(gram)
        # Rounding may leave a zero eigenvalue slightly negative.
        return (eigenvectors / (1 + eigenvalues.clamp(min=0))[..., None, :]) @ eigenvectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (filtered,) = ctx.saved_tensors
        return -(filtered @ ((gradient + gradient.mT) / 2) @ filtered)
