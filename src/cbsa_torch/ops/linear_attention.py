"""Linear attention with features that follow softmax attention (Hedgehog, Zhang et al., ICLR 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from cbsa_torch._core.checks import check_per_head
from cbsa_torch._core.precision import compute_dtype, no_autocast
from cbsa_torch.ops.masking import check_attention, zero_rows


def linear_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    key_mask: Tensor | None = None,
) -> Tensor:
    """phi(Q) (phi(K)^T V) / (phi(Q) phi(K)^T 1) with phi(x) = [exp(g x), exp(-g x)]; O(N).

    g = temperature P^(1/4). The features of Hedgehog without its learned projection: phi(q) . phi(k) =
    2 sum_c cosh(g (q_c + k_c)), to second order 2 P (1 + q . k / P^(1/2) + ...), has the slope of softmax
    attention's exp(q . k / P^(1/2)), besides terms in |q|^2, which cancel, and |k|^2. Not to be confused with
    :func:`cbsa_torch.ops.linear_cbsa` (12), which has one tensor for queries, keys and values.

    Args:
        queries: ``(B, H, N, P)``.
        keys: ``(B, H, K, P)``.
        values: ``(B, H, K, V)``.
        temperature: a number or ``(H,)``.
        key_mask: ``(B, K)`` bool, True = a real key; the others are ignored, whatever they hold. An item
            without any gets zeros.

    Returns:
        ``(B, H, N, V)`` in the dtype of the inputs, computed in float32 or better. An autocast context has no
        effect inside.

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: wrong dtypes.

    Examples:
        >>> from cbsa_torch.ops import linear_attention
        >>> queries, keys = torch.randn(1, 4, 10, 16), torch.randn(1, 4, 30, 16)
        >>> linear_attention(queries, keys, torch.randn(1, 4, 30, 8)).shape
        torch.Size([1, 4, 10, 8])
    """
    check_attention(queries, keys, values, key_mask)
    check_per_head("temperature", temperature, "queries", queries)
    dtype = compute_dtype(queries.dtype)
    with no_autocast(queries):
        q, k, v = queries.to(dtype), keys.to(dtype), values.to(dtype)
        gain = temperature.to(dtype)[:, None, None] if isinstance(temperature, Tensor) else temperature
        k, v = zero_rows(k, key_mask), zero_rows(v, key_mask)
        gain = gain * q.shape[-1] ** 0.25
        logits_q, logits_k = (torch.cat([x, -x], -1) * gain for x in (q, k))  # (B, H, ., 2 P)
        if key_mask is not None:
            # The lowest number and not -inf: an item without any key stays finite.
            logits_k = logits_k.masked_fill(~key_mask[:, None, :, None], torch.finfo(dtype).min)
        # The maximum of each feature over the keys moves to the queries, so that no exponential overflows; the
        # maximum of each query cancels in the ratio.
        largest = logits_k.detach().amax(-2, keepdim=True)
        features_k = torch.exp(logits_k - largest)
        shifted = logits_q + largest
        features_q = torch.exp(shifted - shifted.detach().amax(-1, keepdim=True))
        total = features_k.sum(-2)[..., None]  # (B, H, 2 P, 1), at least 1
        output = (features_q @ (features_k.mT @ v)) / (features_q @ total)
    return output.to(queries.dtype)
