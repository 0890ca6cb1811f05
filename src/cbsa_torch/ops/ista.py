"""One step of ISTA: the white-box feed-forward of CRATE, which the CBT keeps."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from cbsa_torch._core.checks import check_floating, check_shape


def ista_step(tokens: Tensor, dictionary: Tensor, *, step_size: float = 0.1, sparsity: float = 0.1) -> Tensor:
    """One proximal gradient step towards a sparse non-negative code of the tokens over a dictionary D.

    relu(x + eta (D^T x - D^T D x) - eta lambda), for the objective of (2): the gradient of
    1/2 ||x - D a||^2 at a = x, then the proximal map of lambda ||a||_1 with a >= 0.

    Args:
        tokens: ``(..., D)``.
        dictionary: ``(D, D)``, applied as ``F.linear(x, dictionary)``: atoms are its columns.
        step_size: eta, 0.1 in the paper's models.
        sparsity: lambda, the weight of the l1 term, 0.1 in the paper's models.

    Returns:
        The code, the shape of ``tokens``, non-negative.

    Raises:
        ValueError: ``dictionary`` is not ``(D, D)`` for tokens of D channels. TypeError: wrong dtypes.
    """
    check_floating("tokens", tokens)
    check_floating("dictionary", dictionary)
    dim = tokens.shape[-1] if tokens.ndim else 0
    check_shape("dictionary", dictionary, (dim, dim), "(D, D)")
    residual = tokens - F.linear(tokens, dictionary)  # x - D x
    gradient = F.linear(residual, dictionary.t())  # D^T x - D^T D x, with one product less
    return F.relu(tokens + step_size * gradient - step_size * sparsity)
