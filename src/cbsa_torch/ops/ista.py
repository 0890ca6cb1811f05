"""One step of ISTA: the white-box feed-forward of CRATE, which the CBT keeps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cbsa_torch._core.checks import check_floating, check_shape
from cbsa_torch._core.precision import compute_dtype, is_autocast, no_autocast


def ista_step(tokens: Tensor, dictionary: Tensor, *, step_size: float = 0.1, sparsity: float = 0.1) -> Tensor:
    """One proximal gradient step towards a sparse non-negative code of the tokens over a dictionary D.

    relu(x + eta (D^T x - D^T D x) - eta lambda), for the objective of (2): the gradient of
    1/2 ||x - D a||^2 at a = x, then the proximal map of lambda ||a||_1 with a >= 0.

    From as many tokens on (over the whole batch) as there are channels, the two products with D are one,
    with a matrix made first, :func:`ista_matrix`: relu(x + V x - eta lambda). Equal up to rounding, and about
    half the operations and memory; with fewer tokens making the matrix would cost more than it saves.
    ``torch.export`` writes two products for any number of tokens.

    Args:
        tokens: ``(..., D)``.
        dictionary: ``(D, D)``, applied as ``F.linear(x, dictionary)``: atoms are its columns.
        step_size: eta, 0.1 in the paper's models.
        sparsity: lambda, the weight of the l1 term, 0.1 in the paper's models.

    Returns:
        The code, the shape of ``tokens``, non-negative.

    Raises:
        ValueError: ``dictionary`` is not ``(D, D)`` for tokens of D channels. TypeError: wrong dtypes.

    Examples:
        >>> from cbsa_torch.ops import ista_step
        >>> ista_step(torch.tensor([[1.0, -1.0]]), torch.eye(2))  # x is its own code: only the threshold acts
        tensor([[0.9900, 0.0000]])
    """
    check_floating("tokens", tokens)
    check_floating("dictionary", dictionary)
    dim = tokens.shape[-1] if tokens.ndim else 0
    check_shape("dictionary", dictionary, (dim, dim), "(D, D)")
    if torch.compiler.is_exporting() or tokens.numel() < dim * dim:
        return ista_equation(tokens, dictionary, step_size, sparsity)
    return ista_by_matrix(tokens, ista_matrix(dictionary, step_size=step_size), step_size * sparsity)


def ista_matrix(dictionary: Tensor, *, step_size: float = 0.1) -> Tensor:
    """The matrix V = eta (D^T - D^T D) of a step of ISTA as one product, x + V x.

    Args:
        dictionary: D, ``(D, D)``.
        step_size: eta.

    Returns:
        ``(D, D)`` in the dtype of the dictionary, computed in float32 or better, whatever autocast says.

    Raises:
        ValueError: ``dictionary`` is not ``(D, D)``. TypeError: wrong dtype.

    Examples:
        >>> from cbsa_torch.ops import ista_matrix
        >>> ista_matrix(2 * torch.eye(2))  # 0.1 (2 - 4)
        tensor([[-0.2000,  0.0000],
                [ 0.0000, -0.2000]])
    """
    check_floating("dictionary", dictionary)
    dim = dictionary.shape[-1] if dictionary.ndim else None
    check_shape("dictionary", dictionary, (dim, dim), "(D, D)")
    with no_autocast(dictionary):
        transposed = dictionary.to(compute_dtype(dictionary.dtype)).t()
        return (step_size * (transposed - transposed @ transposed.t())).to(dictionary.dtype)


def ista_by_matrix(tokens: Tensor, matrix: Tensor, threshold: float) -> Tensor:
    """relu(x + V x - threshold): a step of ISTA by its matrix (:func:`ista_matrix`), threshold eta lambda."""
    if is_autocast(tokens):  # which would round x as well
        return F.relu(tokens + F.linear(tokens, matrix) - threshold)
    rows = tokens.reshape(-1, tokens.shape[-1])
    return torch.addmm(rows, rows, matrix.t()).sub_(threshold).relu_().view(tokens.shape)


def ista_equation(tokens: Tensor, dictionary: Tensor, step_size: float, sparsity: float) -> Tensor:
    """:func:`ista_step` as it is written, by two products with every token."""
    residual = tokens - F.linear(tokens, dictionary)  # x - D x
    gradient = F.linear(residual, dictionary.t())  # D^T x - D^T D x, with one product less
    return F.relu(tokens + step_size * gradient - step_size * sparsity)
