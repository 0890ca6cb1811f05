"""How long a step may be for which the coding rate of the representatives provably does not rise.

The step is certified for kappa up to 2 / |B|^2, see :func:`cbsa_torch.ops.certified_cbsa`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cbsa_torch.ops.cbsa.inputs import CBSAInputs
from cbsa_torch.ops.token_weights import dense, norm_bound

SMALLEST_ETA = 0.1
"""The bound takes no |eta| below: without first guesses of tokens the step would grow as 1 / eta."""

BOUND = "frobenius"
BOUND_IN_GRADIENT = False


def all_weights(attention: Tensor, inputs: CBSAInputs) -> Tensor:
    """B ``(B, H, M, N)``: Pi + eta A, or A if it was given."""
    if inputs.attention is not None:
        return attention
    weights = inputs.step_representatives.to(attention.dtype)[:, None, None] * attention
    if inputs.token_weights is None:
        return weights
    n, first = inputs.tokens.shape[2], inputs.num_prefix_tokens
    pi = dense(inputs.token_weights, attention, inputs.representative_mask, n, first)
    if inputs.token_mask is not None:
        pi = pi.masked_fill(~inputs.token_mask[:, None, None, :], 0.0)
    return pi + weights


def limit_of(attention: Tensor, inputs: CBSAInputs) -> Tensor:
    """The largest certified step of every item and head ``(B, H)``, 0 where no token has any weight."""
    bound = _bound(attention, inputs)
    if not BOUND_IN_GRADIENT:
        bound = bound.detach()
    nothing = bound == 0
    return (2 / bound.masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0)


def _bound(attention: Tensor, inputs: CBSAInputs) -> Tensor:
    """A bound of the squared spectral norm of B, ``(B, H)``."""
    if inputs.attention is not None:
        return torch.minimum(attention.square().sum((-2, -1)), _product(attention))
    eta = inputs.step_representatives.to(attention.dtype).abs().clamp(min=SMALLEST_ETA)
    if BOUND == "gram":
        b = all_weights(attention, inputs)
        given = inputs.step_representatives.to(attention.dtype).abs()
        return _gram_bound(b @ b.mT) * (1 if inputs.token_weights is not None else (eta / given).square())
    if BOUND == "product":
        b = all_weights(attention, inputs)
        given = inputs.step_representatives.to(attention.dtype).abs()
        return _product(b) * (1 if inputs.token_weights is not None else (eta / given).square())
    norm = eta * attention.square().sum((-2, -1)).sqrt()
    if inputs.token_weights is not None:
        norm = norm + norm_bound(inputs.token_weights, attention, inputs.representative_mask)
    return norm.square()


def _gram_bound(gram: Tensor) -> Tensor:
    """A bound of the largest eigenvalue of B B^T: max_i (|G| v)_i / v_i for a positive v, v_i = G_ii^(1/2)."""
    v = gram.diagonal(dim1=-2, dim2=-1).sqrt()[..., None]
    ratio = (gram.abs() @ v) / v
    return ratio.masked_fill(v == 0, 0.0).amax((-2, -1))


def _product(b: Tensor) -> Tensor:
    sizes = b.abs()
    return sizes.sum(-1).amax(-1) * sizes.sum(-2).amax(-1)
