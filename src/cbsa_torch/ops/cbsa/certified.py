"""How long a step may be for which the coding rate of the representatives provably does not rise.

It is certified for kappa up to 2 / |G|, where G = B B^T and B ``(M, N)`` are the weights by which tokens make
up the representatives: see :func:`cbsa_torch.ops.certified_cbsa`. G is of size M x M and a sum over tokens, so
it is known when the representatives are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SMALLEST = 0.01
"""The bound is never less than this part of that of A alone. Else the step would grow as 1 / eta where the
initial guess is constant, and without limit where Pi and eta A cancel."""
MARGIN = 1e-4
"""Steps stay this part below the limit: the sigmoid of a large logit is 1 in float32, and rounding would then
take a step beyond the limit where the bound is the eigenvalue itself."""


def limit(gram: Tensor, own: Tensor) -> Tensor:
    """The longest certified step, (1 - ``MARGIN``) 2 over a bound of |G|.

    It is 0 where no token has any weight, and where a bound is too large or too small for its dtype.

    Args:
        gram: G ``(B, H, M, M)``.
        own: A A^T, of the attention alone.

    Returns:
        ``(B, H)``, without gradients.
    """
    bound = torch.maximum(largest_eigenvalue_bound(gram), SMALLEST * largest_eigenvalue_bound(own)).detach()
    return ((1 - MARGIN) * 2 / bound).nan_to_num(nan=0.0, posinf=0.0)


def largest_eigenvalue_bound(gram: Tensor) -> Tensor:
    """A bound ``(...)`` of the largest eigenvalue of positive semi-definite matrices G ``(..., M, M)``.

    For any positive v it is at most max_i (|G| v)_i / v_i, entries taken by absolute value (Collatz, Wielandt).
    With v_i = G_ii^(1/2) that is at most the trace of G, and the eigenvalue itself if G is diagonal or has rank
    one.
    """
    v = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()[..., None]
    ratio = (gram.abs() @ v) / v
    return ratio.masked_fill(v == 0, 0.0).amax((-2, -1))  # a row without weights is none


class RunningGram:
    """A A^T and A Pi^T of an attention that comes tile by tile, each with a softmax of its own.

    Args:
        columns: Pi over a range of tokens, ``(1 or B, 1, M, T)``; None without Pi.
    """

    def __init__(self, columns: Callable[[slice], Tensor] | None) -> None:
        self.columns = columns
        self.own: Tensor | None = None
        self.cross: Tensor | None = None
        self.lse: Tensor | None = None

    def add(self, weights: Tensor, lse: Tensor | None, place: slice) -> None:
        """Add the softmax of a tile ``(B, H, M, T)``; ``lse`` ``(B, H, M)`` is None if there is one tile."""
        own = weights @ weights.mT
        cross = None if self.columns is None else weights @ self.columns(place).mT
        if self.own is None:
            self.own, self.cross, self.lse = own, cross, lse
            return
        assert self.lse is not None, "of several tiles"
        assert lse is not None, "of several tiles"
        total = torch.logaddexp(self.lse, lse)
        before, now = ((x - total).exp()[..., None] for x in (self.lse, lse))  # shares, (B, H, M, 1)
        self.own = self.own * (before * before.mT) + own * (now * now.mT)
        if cross is not None and self.cross is not None:
            self.cross = self.cross * before + cross * now
        self.lse = total

    def limit(self, eta: Tensor, of_pi: Tensor | None = None) -> Tensor:
        """The longest certified step ``(B, H)`` for B = Pi + eta A, of all that was added.

        Args:
            eta: ``(H, 1, 1)``.
            of_pi: Pi Pi^T ``(1 or B, 1, M, M)``; None without Pi.
        """
        assert self.own is not None, "tokens were added"
        total = eta.square() * self.own
        if of_pi is not None and self.cross is not None:
            cross = eta * self.cross
            total = total + cross + cross.mT + of_pi
        return limit(total, self.own)
