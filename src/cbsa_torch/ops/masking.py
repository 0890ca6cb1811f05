"""Masks of tokens: True stands for what exists. Masked entries may hold anything, NaN included."""

from __future__ import annotations

import torch
from torch import Tensor

from cbsa_torch._core.checks import check_floating, check_mask, check_rows, check_shape
from cbsa_torch.ops.parallel import ContextParallel, total


def check_tokens(tokens: Tensor, token_mask: Tensor | None, parallel: ContextParallel | None = None) -> None:
    """Raise unless ``tokens`` is ``(B, H, N, P)`` and ``token_mask`` None or ``(B, N)`` bool."""
    check_floating("tokens", tokens)
    length = None if parallel is None else parallel.length
    check_shape("tokens", tokens, (None, None, length, None), "(B, H, N, P)")
    if token_mask is not None:
        sizes = tokens.shape[0], tokens.shape[2]
        check_mask("token_mask", token_mask, sizes, "(B, N)", "a real token", ("tokens", tokens))


def check_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    key_mask: Tensor | None,
    parallel: ContextParallel | None = None,
) -> None:
    """Raise unless these are ``(B, H, N, P)``, ``(B, H, K, P)``, ``(B, H, K, V)`` and, if given, ``(B, K)``."""
    check_floating("queries", queries)
    check_shape("queries", queries, (None, None, None, None), "(B, H, N, P)")
    b, h, _, p = queries.shape
    length = None if parallel is None else parallel.length
    check_rows("keys", keys, (b, h, length, p), "(B, H, K, P)", "queries", queries)
    check_rows("values", values, (b, h, keys.shape[2], None), "(B, H, K, V)", "queries", queries)
    if key_mask is not None:
        check_mask("key_mask", key_mask, (b, keys.shape[2]), "(B, K)", "a real key", ("keys", keys))


def real_tokens(
    tokens: Tensor, token_mask: Tensor | None, dtype: torch.dtype, parallel: ContextParallel | None = None
) -> tuple[Tensor, Tensor | int]:
    """Tokens in ``dtype``, zero where masked; and how many are real: N, or ``(B, 1, 1, 1)`` of at least 1.

    With ``parallel``, how many are real on all ranks together.
    """
    values = zero_rows(tokens.to(dtype), token_mask)
    if token_mask is None:
        return values, tokens.shape[2] if parallel is None else parallel.num_tokens
    count = token_mask.sum(-1)
    if parallel is not None:
        count = total(count, parallel.group)
    return values, count.clamp(min=1).to(dtype)[:, None, None, None]


def zero_rows(rows: Tensor, mask: Tensor | None) -> Tensor:
    """``(B, H, rows, P)`` with zeros where ``mask`` ``(B, rows)`` is False.

    Multiplying by a weight of 0 is not enough: 0 * NaN = NaN.
    """
    return rows if mask is None else rows.masked_fill(~mask[:, None, :, None], 0.0)


def masked_softmax(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the last axis; entries where ``mask`` is False get 0, also in a row that has no other.

    Args:
        logits: any shape.
        mask: bool, to be broadcast to ``logits``; None: all True.
    """
    if mask is None:
        return torch.softmax(logits, dim=-1)
    lowest = torch.finfo(logits.dtype).min  # unlike -inf it keeps a row without any entry finite
    return torch.softmax(logits.masked_fill(~mask, lowest), dim=-1).masked_fill(~mask, 0.0)
