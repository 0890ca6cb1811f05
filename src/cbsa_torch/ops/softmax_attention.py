"""Softmax attention, and MSSA: the same with one tensor as query, key and value (Eq. 9)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from cbsa_torch._core.checks import check_floating, check_mask, check_number, check_same_kind, check_shape
from cbsa_torch.ops.masking import check_tokens, real_tokens


def softmax_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention, softmax(scale * Q K^T) V, by PyTorch's fused kernels.

    Args:
        queries: ``(B, H, N, P)``.
        keys: ``(B, H, K, P)``.
        values: ``(B, H, K, V)``.
        scale: factor on the logits. Default: P^-1/2.
        key_mask: ``(B, K)`` bool, True = a real key; the others are ignored, whatever they hold. An item
            without any gets zeros.

    Returns:
        ``(B, H, N, V)`` in the dtype of the inputs.

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: wrong dtypes.
    """
    if scale is not None:
        check_number("scale", scale)
    check_floating("queries", queries)
    check_shape("queries", queries, (None, None, None, None), "(B, H, N, P)")
    b, h, _, p = queries.shape
    check_floating("keys", keys)
    check_shape("keys", keys, (b, h, None, p), "(B, H, K, P)")
    check_same_kind("keys", keys, "queries", queries)
    check_floating("values", values)
    check_shape("values", values, (b, h, keys.shape[2], None), "(B, H, K, V)")
    check_same_kind("values", values, "queries", queries)
    if key_mask is None:
        return F.scaled_dot_product_attention(queries, keys, values, scale=scale)
    check_mask("key_mask", key_mask, (b, keys.shape[2]), "(B, K)", "a real key")
    hidden = ~key_mask[:, None, :, None]
    keys, values = keys.masked_fill(hidden, 0.0), values.masked_fill(hidden, 0.0)  # 0 * NaN = NaN
    # A row of weights needs something to sum to 1 over: an item without any real key averages its zeros.
    attended = key_mask | ~key_mask.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=attended[:, None, None, :], scale=scale
    )


def mssa(tokens: Tensor, *, scale: float | None = None, token_mask: Tensor | None = None) -> Tensor:
    """Multi-head Subspace Self-Attention of CRATE inside each head's subspace: W softmax(W^T W) (Eq. 9).

    CBSA whose representatives are the tokens themselves (M = N, A = I) with contraction (8). O(N^2).

    Args:
        tokens: ``(B, H, N, P)`` tokens in each subspace, U_k^T Z, as query, key and value.
        scale: factor on the logits. Default: P^-1/2.
        token_mask: ``(B, N)`` bool, True = a real token. The others are ignored, whatever they hold, and
            get zeros.

    Returns:
        ``(B, H, N, P)`` in the dtype of ``tokens``.

    Raises:
        ValueError: shapes that do not fit. TypeError: wrong dtypes.
    """
    check_tokens(tokens, token_mask)
    w, _ = real_tokens(tokens, token_mask, tokens.dtype)
    output = softmax_attention(w, w, w, scale=scale, key_mask=token_mask)
    return output if token_mask is None else output.masked_fill(~token_mask[:, None, :, None], 0.0)


__all__ = ["mssa", "softmax_attention"]
