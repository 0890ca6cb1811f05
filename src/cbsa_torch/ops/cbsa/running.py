"""Extraction (5) from tokens that come in chunks, of any size and in any order: exact, in memory of M x P."""

from __future__ import annotations

import torch
from torch import Tensor

from cbsa_torch._core.precision import solve_dtype
from cbsa_torch.ops.cbsa.certified import RunningGram
from cbsa_torch.ops.cbsa.tiles import log_sum_exp


class RunningExtraction:
    """R = A V and the normaliser of A, of all chunks that were added. Without gradients.

    Args:
        queries: ``(B, H, M, P)`` initial representatives.
        scale: factor on the logits.
        gram: what sums up G = B B^T of a certified step along the way.

    Attributes:
        picked: R ``(B, H, M, P)``. lse: log sum exp of the logits, ``(B, H, M)``. Both None before the first
            chunk, and summed in float64 where the device has it.
    """

    def __init__(self, queries: Tensor, scale: float, gram: RunningGram | None = None) -> None:
        self.queries = scale * queries
        self.gram = gram
        self.picked: Tensor | None = None
        self.lse: Tensor | None = None

    def add(self, keys: Tensor, values: Tensor, place: slice) -> None:
        """Add keys and values ``(B, H, T, P)``, those of the tokens in ``place``."""
        logits = self.queries @ keys.mT  # (B, H, M, T)
        weights = torch.softmax(logits, dim=-1)
        wide = solve_dtype(logits)
        lse, picked = log_sum_exp(logits, weights, wide), (weights @ values).to(wide)
        if self.gram is not None:
            self.gram.add(weights, lse, place)
        if self.picked is None or self.lse is None:
            self.picked, self.lse = picked, lse
            return
        total = torch.logaddexp(self.lse, lse)
        before, now = ((x - total).exp()[..., None] for x in (self.lse, lse))
        self.picked = before * self.picked + now * picked
        self.lse = total

    def results(self) -> tuple[Tensor, Tensor]:
        """The normaliser and R, once all chunks were added."""
        assert self.lse is not None, "tokens were added"
        assert self.picked is not None, "tokens were added"
        return self.lse, self.picked


def attention(queries: Tensor, keys: Tensor, scale: float, lse: Tensor) -> Tensor:
    """A^T ``(B, H, M, T)`` of a chunk of keys, from the normaliser of all of them."""
    logits = (scale * queries) @ keys.mT
    return logits.sub_(lse[..., None].to(logits.dtype)).exp_()
