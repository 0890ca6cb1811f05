"""Softmax attention, and MSSA: the same with one tensor as query, key and value (Eq. 9)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cbsa_torch._core.checks import check_device, check_number
from cbsa_torch._core.precision import no_autocast
from cbsa_torch.ops.masking import check_attention, check_tokens, real_tokens, zero_rows


def softmax_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention, softmax(scale * Q K^T) V, by PyTorch's fused kernels.

    Vaswani et al., 2017; of subspaces it is :func:`mssa` (Eq. 9).

    Args:
        queries: ``(B, H, N, P)``.
        keys: ``(B, H, K, P)``.
        values: ``(B, H, K, V)``.
        scale: factor on the logits. Default: P^-1/2.
        key_mask: ``(B, K)`` bool, True = a real key; the others are ignored, whatever they hold. An item
            without any gets zeros.
        attn_mask: a mask that may differ from query to query, to be broadcast to ``(B, H, N, K)``: bool, True
            = attend, or floating point, added to the logits.
        dropout: rate at which attention weights are dropped.

    Returns:
        ``(B, H, N, V)`` in the dtype of the inputs. An autocast context has no effect inside.

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: wrong dtypes.

    Examples:
        >>> from cbsa_torch.ops import softmax_attention
        >>> queries, keys = torch.randn(1, 4, 10, 16), torch.randn(1, 4, 30, 16)
        >>> softmax_attention(queries, keys, torch.randn(1, 4, 30, 8)).shape
        torch.Size([1, 4, 10, 8])
    """
    if scale is not None:
        check_number("scale", scale)
    check_attention(queries, keys, values, key_mask)
    if attn_mask is not None:
        _check_attn_mask(attn_mask, queries, keys)
    if key_mask is not None:
        keys, values = zero_rows(keys, key_mask), zero_rows(values, key_mask)
        # A row of weights needs something to sum to 1 over.
        nothing = ~key_mask.any(-1)[:, None, None, None]
        attended = key_mask[:, None, None, :] | nothing
        if attn_mask is None or attn_mask.dtype == torch.bool:
            attn_mask = attended if attn_mask is None else attn_mask & attended
        else:
            attn_mask = attn_mask.masked_fill(~attended, -torch.inf)
    with no_autocast(queries):
        output = F.scaled_dot_product_attention(queries, keys, values, attn_mask, dropout, scale=scale)
    return output if key_mask is None else output.masked_fill(nothing, 0.0)


def _check_attn_mask(attn_mask: Tensor, queries: Tensor, keys: Tensor) -> None:
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a torch.Tensor, got {type(attn_mask).__name__}")
    if attn_mask.dtype not in (torch.bool, queries.dtype):
        raise TypeError(f"attn_mask must be boolean or {queries.dtype}, as the queries; got {attn_mask.dtype}")
    full = (*queries.shape[:3], keys.shape[2])
    fits = attn_mask.ndim <= 4 and all(
        side in (1, want) for side, want in zip(reversed(attn_mask.shape), reversed(full), strict=False)
    )
    if not fits:
        raise ValueError(f"attn_mask must broadcast to (B, H, N, K) = {full}, got {tuple(attn_mask.shape)}")
    check_device("attn_mask", attn_mask, "queries", queries)


def mssa(
    tokens: Tensor,
    *,
    scale: float | None = None,
    token_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Multi-head Subspace Self-Attention of CRATE in each head's subspace: softmax(scale W W^T) W (Eq. 9).

    W = (U_k^T Z)^T has tokens as rows; the scale on the logits is the implementation's. CBSA whose
    representatives are the tokens themselves (M = N, A = I) with contraction (8). O(N^2).

    Args:
        tokens: ``(B, H, N, P)`` tokens in each subspace, U_k^T Z, as query, key and value.
        scale: factor on the logits. Default: P^-1/2.
        token_mask: ``(B, N)`` bool, True = a real token. The others are ignored, whatever they hold, and
            get zeros.
        attn_mask, dropout: as in :func:`softmax_attention`.

    Returns:
        ``(B, H, N, P)`` in the dtype of ``tokens``.

    Raises:
        ValueError: shapes that do not fit. TypeError: wrong dtypes.

    Examples:
        >>> from cbsa_torch.ops import mssa
        >>> mssa(torch.randn(2, 4, 196, 16)).shape
        torch.Size([2, 4, 196, 16])
    """
    check_tokens(tokens, token_mask)
    w, _ = real_tokens(tokens, token_mask, tokens.dtype)
    output = softmax_attention(w, w, w, scale=scale, key_mask=token_mask, attn_mask=attn_mask, dropout=dropout)
    return zero_rows(output, token_mask)
