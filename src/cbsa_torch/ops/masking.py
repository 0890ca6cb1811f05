"""Reading tokens in heads with their mask, for the operators that need nothing more."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cbsa_torch._core.checks import check_floating, check_mask, check_shape


class RealTokens(NamedTuple):
    """Tokens in the dtype to compute in, with zeros in place of masked ones."""

    values: Tensor
    """``(B, H, N, P)``."""
    number: Tensor | int
    """How many are real: N, or ``(B, 1, 1, 1)`` with a mask, at least 1."""


def check_tokens(tokens: Tensor, token_mask: Tensor | None) -> None:
    """Raise unless ``tokens`` is ``(B, H, N, P)`` and ``token_mask`` None or ``(B, N)`` bool."""
    check_floating("tokens", tokens)
    check_shape("tokens", tokens, (None, None, None, None), "(B, H, N, P)")
    if token_mask is not None:
        check_mask("token_mask", token_mask, (tokens.shape[0], tokens.shape[2]), "(B, N)", "a real token")


def real_tokens(tokens: Tensor, token_mask: Tensor | None, dtype: torch.dtype) -> RealTokens:
    """Read checked tokens. Padding may hold anything, NaN included, and 0 * NaN = NaN: hence the zeros."""
    values = tokens.to(dtype)
    if token_mask is None:
        return RealTokens(values, tokens.shape[2])
    count = token_mask.sum(-1).clamp(min=1).to(dtype)[:, None, None, None]
    return RealTokens(values.masked_fill(~token_mask[:, None, :, None], 0.0), count)
