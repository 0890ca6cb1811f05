"""CBSA equation by equation: extract (5), contract (7) or (8), broadcast.

This is the oracle: nothing here is clever, and every faster form is tested against it. Rows are tokens
(the paper's are columns), so U_k^T Z of the paper is ``tokens[b, k].mT`` here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cbsa_torch._core.precision import compute_dtype, no_autocast, solve_dtype
from cbsa_torch._core.tracing import is_open
from cbsa_torch._core.types import CBSAStages
from cbsa_torch.ops.cbsa.certified import limit
from cbsa_torch.ops.cbsa.inputs import CBSAInputs, tokens_per_representative
from cbsa_torch.ops.definite import solve
from cbsa_torch.ops.masking import masked_softmax, zero_rows
from cbsa_torch.ops.token_weights import columns


def extract(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Eq. 5: A = softmax over tokens of (U^T Z)^T (U^T Q_ini), and the weighted tokens it picks.

    Args:
        queries: ``(B, H, M, P)`` initial representatives.
        keys: ``(B, H, N, P)``.
        values: ``(B, H, N, P)``.
        scale: factor on the logits, P^-1/2 in the official implementation.
        key_mask: ``(B, N)`` bool, True = a real token.

    Returns:
        The attention ``(B, H, M, N)`` (rows sum to 1, or to 0 without any real token) and
        attention @ values ``(B, H, M, P)``.
    """
    logits = (scale * queries) @ keys.mT  # (B, H, M, N)
    attention = masked_softmax(logits, None if key_mask is None else key_mask[:, None, None, :])
    return attention, attention @ values


def contract_softmax(
    representatives: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Eq. 8: softmax self-attention among the representatives, in place of the inverse of Eq. 7.

    Args:
        representatives: ``(B, H, M, P)``.
        scale: factor on the logits.
        mask: ``(B, M)`` bool, True = a real representative.

    Returns:
        The attention ``(B, H, M, M)`` and the contraction ``(B, H, M, P)``.
    """
    logits = (scale * representatives) @ representatives.mT  # (B, H, M, M)
    attention = masked_softmax(logits, None if mask is None else mask[:, None, None, :])
    return attention, attention @ representatives


def contract_exact(representatives: Tensor, eps: float, mask: Tensor | None = None) -> Tensor:
    """Eq. 7: C = Q (I_M + alpha Q^T Q)^-1 with alpha = P / (M eps^2), for columns Q.

    alpha * C is the gradient of the coding rate (1) of Q. In rows, with X = Q^T,
    C = (I_M + alpha X X^T)^-1 X = X (I_P + alpha X^T X)^-1: the smaller of the two systems is solved, by
    Cholesky, in float64 where the device has it. The matrix is at least the identity; its condition number
    grows with the energy of the tokens over eps^2. From about 1e16 on the identity is lost in rounding: where
    the other term is singular the result is then NaN, or wrong without a sign of it.

    Args:
        representatives: ``(B, H, M, P)``; rows where ``mask`` is False must be zero.
        eps: the quantisation precision epsilon.
        mask: ``(B, M)`` bool; M in alpha counts the real representatives of each item.

    Returns:
        The contraction ``(B, H, M, P)``.
    """
    rep = representatives.to(solve_dtype(representatives))
    matrix, _, by_channels = exact_system(rep, eps, mask)
    solved = solve(matrix, rep.mT if by_channels else rep)
    return (solved.mT if by_channels else solved).to(representatives.dtype)


def exact_system(rep: Tensor, eps: float, mask: Tensor | None) -> tuple[Tensor, Tensor | float, bool]:
    """The matrix of :func:`contract_exact`.

    Returns:
        I_P + alpha X^T X, or I_M + alpha X X^T if M < P; alpha; and whether it is the first. It always is where
        an export leaves M open.
    """
    m, p = rep.shape[-2:]
    by_channels = is_open(m) or p <= m
    count = m if mask is None else mask.sum(-1).clamp(min=1).to(rep.dtype)[:, None, None, None]  # (B, 1, 1, 1)
    alpha = p / (count * eps**2)
    scaled = alpha * rep
    gram = rep.mT @ scaled if by_channels else rep @ scaled.mT
    identity = torch.eye(p if by_channels else m, dtype=rep.dtype, device=rep.device)
    return identity + gram, alpha, by_channels


def _gram(weights: Tensor) -> Tensor:
    """B B^T, without gradients."""
    weights = weights.detach()
    return weights @ weights.mT


def broadcast(weights: Tensor, contracted: Tensor, step: Tensor | float) -> Tensor:
    """Give each token the contractions, weighted: ``weights @ (step * contracted)``.

    Args:
        weights: ``(B, H, N, M)``, A with tokens as rows; not renormalised over representatives.
        contracted: ``(B, H, M, P)``.
        step: kappa, a number, ``(H, 1, 1)`` or ``(B, H, 1, 1)``.

    Returns:
        ``(B, H, N, P)``.
    """
    return weights @ (step * contracted)


def project_out(heads: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Join the heads ``(B, H, N, P)`` and project out of the subspaces, ``(B, N, C)``, in their dtype."""
    with no_autocast(heads):
        weight, bias = weight.to(heads.dtype), None if bias is None else bias.to(heads.dtype)
        return F.linear(heads.transpose(1, 2).flatten(2), weight, bias)


def cbsa_stages(inputs: CBSAInputs) -> CBSAStages:
    """Evaluate CBSA equation by equation and return every intermediate.

    Args:
        inputs: made by :func:`cbsa_torch.ops.cbsa_inputs`.

    Returns:
        :class:`CBSAStages`: attention, extracted and contracted representatives, output, ... in the dtype
        they are computed in: float32 for inputs of lower precision, else their own. An autocast context has
        no effect inside.

    Raises:
        ValueError: the tokens are spread over processes.

    Examples:
        >>> from cbsa_torch.ops import cbsa_inputs, cbsa_stages, pool_representatives
        >>> tokens = torch.randn(1, 2, 16, 8)
        >>> guess = pool_representatives(tokens, (4, 4), 4)
        >>> stages = cbsa_stages(cbsa_inputs(tokens, guess.values))
        >>> stages.attention.shape, stages.contracted.shape
        (torch.Size([1, 2, 4, 16]), torch.Size([1, 2, 4, 8]))
    """
    if inputs.parallel is not None:
        raise ValueError("stages are of tokens that are all here: the inputs must have no parallel")
    dtype = compute_dtype(inputs.tokens.dtype)
    token_mask, key_mask, representative_mask = inputs.token_mask, inputs.key_mask, inputs.representative_mask
    with no_autocast(inputs.tokens):
        eta = inputs.step_representatives.to(dtype)[:, None, None]
        kappa = inputs.step_tokens.to(dtype)[:, None, None]
        # Padding may hold anything, NaN included, and 0 * NaN = NaN: fill it before any product.
        tokens = zero_rows(inputs.tokens.to(dtype), token_mask)
        # Several products read them: heads of a joint projection would be copied for each.
        representatives = zero_rows(inputs.representatives.to(dtype), representative_mask).contiguous()

        if inputs.attention is None:
            keys = zero_rows(inputs.keys.to(dtype), key_mask).contiguous()
            shared = inputs.values is inputs.keys
            values = keys if shared else zero_rows(inputs.values.to(dtype), key_mask).contiguous()
            attention, picked = extract(representatives, keys, values, inputs.scale, key_mask)
            extracted = representatives + eta * picked
        else:
            attention, extracted = inputs.attention.to(dtype), representatives
            if token_mask is not None:
                attention = attention.masked_fill(~token_mask[:, None, None, :], 0.0)
        # what does not exist attends to nothing
        attention, extracted = (zero_rows(t, representative_mask) for t in (attention, extracted))

        contraction_attention = None
        if inputs.contraction == "softmax":
            contraction_attention, contracted = contract_softmax(extracted, inputs.scale, representative_mask)
        elif inputs.contraction == "exact":
            contracted = contract_exact(extracted, inputs.eps, representative_mask)
        else:
            contracted = extracted
        contracted = zero_rows(contracted, representative_mask)

        if inputs.broadcast == "softmax":
            logits = tokens @ (inputs.scale * representatives).mT  # (B, H, N, M)
            weights = masked_softmax(
                logits, None if representative_mask is None else representative_mask[:, None, None, :]
            )
            weights = zero_rows(weights, token_mask)
            if key_mask is not None:  # without any real key there is nothing to attend to
                weights = weights.masked_fill(~key_mask.any(-1)[:, None, None, None], 0.0)
        elif inputs.fraction is None:
            weights = attention.mT
        else:
            weights, own = attention, _gram(attention)
            gram = own
            if inputs.attention is None:
                weights, gram = eta * attention, eta.detach().square() * own
            if inputs.token_weights is not None:  # B = Pi + eta A
                weights = weights + columns(inputs.token_weights, slice(0, tokens.shape[2]), weights)
                gram = _gram(weights)
            weights = weights.mT
            kappa = -(inputs.fraction.to(dtype) * limit(gram, own))[..., None, None]  # (B, H, 1, 1)
        if inputs.relative:
            kappa = kappa * tokens_per_representative(inputs)
        output = broadcast(weights, contracted, kappa)
    return CBSAStages(
        tokens,
        representatives,
        attention,
        extracted,
        contraction_attention,
        contracted,
        weights,
        output,
        kappa[..., 0, 0].expand(tokens.shape[0], -1),
        representative_mask,
    )
