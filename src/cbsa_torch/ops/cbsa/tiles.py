"""The sweeps over tokens in plain PyTorch, tile by tile: any device, any dtype.

Every tile has a softmax of its own, P = exp(S - l_tile), by torch's kernel, which is several times faster
than an exponential written out. The softmax over all tokens is A = exp(l_tile - l) P: a factor per
representative, which goes into the small operands and never touches the M x T weights.

Tensors are ``(B, H, rows, P)``; items are taken one by one, so that the heads of a joint projection are read
in place, without a copy. Rows of masked tokens are zeroed as they are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 1024
"""Tokens per tile."""


class _Tile(NamedTuple):
    """Some tokens of one item."""

    item: int
    place: slice
    real: Tensor | None
    """``(T,)`` bool."""

    def read(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """``(H, T, P)`` of ``rows``, zero where masked: padding may hold NaN."""
        part = rows[self.item, :, self.place].to(dtype)
        return part if self.real is None else part.masked_fill(~self.real[:, None], 0.0)

    def softmax(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The tile's own softmax ``(H, M, T)`` and log-sum-exp ``(H, M, 1)``, without its masked tokens.

        The lowest number stands for -inf: a tile without any real token gets a log-sum-exp that makes its
        share vanish beside any other.
        """
        logits = queries[self.item] @ keys.mT
        if self.real is not None:
            logits = logits.masked_fill_(~self.real, torch.finfo(logits.dtype).min)
        weights = torch.softmax(logits, dim=-1)
        # exp(max S - l) is the largest weight, and no less than 1 / T
        return weights, logits.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()


def _tiles(k: Tensor, mask: Tensor | None) -> Iterator[_Tile]:
    b, _, n, _ = k.shape
    for item in range(b):
        for start in range(0, n, TILE):
            place = slice(start, min(start + TILE, n))
            yield _Tile(item, place, None if mask is None else mask[item, place])


def extract(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """R = A V and the log-sum-exp ``(B, H, M)``; zero and +inf for items without any real token."""
    queries = scale * q
    picked = torch.zeros_like(q)
    lse = torch.full_like(q[..., :1], -torch.inf)  # (B, H, M, 1), of the tiles so far
    for tile in _tiles(k, mask):
        i, keys = tile.item, tile.read(k, q.dtype)
        weights, lse_tile = tile.softmax(queries, keys)
        now = torch.logaddexp(lse[i], lse_tile)
        values = keys if v is k else tile.read(v, q.dtype)
        picked[i] = (lse[i] - now).exp() * picked[i] + (lse_tile - now).exp() * (weights @ values)
        lse[i] = now
    if mask is not None:
        empty = ~mask.any(-1)[:, None, None, None]
        picked, lse = picked.masked_fill(empty, 0.0), lse.masked_fill(empty, torch.inf)
    return picked, lse[..., 0]


def broadcast(q: Tensor, k: Tensor, lse: Tensor, carried: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """O = A^T (kappa C), with A computed again."""
    queries = scale * q
    output = _like_tokens(k, q.dtype)
    for tile in _tiles(k, mask):
        weights, share = _weights(tile, queries, tile.read(k, q.dtype), lse)
        output[tile.item, :, tile.place] = weights.mT @ (share * carried[tile.item])
    return output


def collect(q: Tensor, k: Tensor, lse: Tensor, d_out: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """T = A dO."""
    queries = scale * q
    collected = torch.zeros_like(q)
    for tile in _tiles(k, mask):
        weights, share = _weights(tile, queries, tile.read(k, q.dtype), lse)
        collected[tile.item] += share * (weights @ tile.read(d_out, q.dtype))
    return collected


def differentiate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    carried: Tensor,
    collected: Tensor,
    d_out: Tensor,
    d_picked: Tensor,
    picked: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of Q (through A), K and V from those of A dO (kappa C) and of A V (dR).

    D_i = sum_n A_in dA_in needs no sweep of its own: it is made of tensors of size M x P.
    """
    queries = scale * q
    row_sums = (carried * collected + d_picked * picked).sum(-1, keepdim=True)  # D, (B, H, M, 1)
    d_queries = torch.zeros_like(q)
    d_keys, d_values = _like_tokens(k, q.dtype), _like_tokens(k, q.dtype)
    for tile in _tiles(k, mask):
        i, keys = tile.item, tile.read(k, q.dtype)
        values = keys if v is k else tile.read(v, q.dtype)
        weights, share = _weights(tile, queries, keys, lse)
        d_weights = torch.baddbmm(-share * row_sums[i], share * carried[i], tile.read(d_out, q.dtype).mT)
        d_weights = d_weights.baddbmm_(share * d_picked[i], values.mT)
        d_logits = d_weights.mul_(weights)  # (H, M, T)
        d_queries[i] += d_logits @ keys
        d_keys[i, :, tile.place] = d_logits.mT @ queries[i]
        d_values[i, :, tile.place] = weights.mT @ (share * d_picked[i])
    return scale * d_queries, d_keys, d_values


def _weights(tile: _Tile, queries: Tensor, keys: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The tile's own softmax ``(H, M, T)`` and its share in A ``(H, M, 1)``."""
    weights, lse_tile = tile.softmax(queries, keys)
    return weights, (lse_tile - lse[tile.item][..., None]).exp()


def _like_tokens(k: Tensor, dtype: torch.dtype) -> Tensor:
    """``(B, H, N, P)``, laid out so that joining the heads is no copy."""
    b, h, n, p = k.shape
    return torch.empty(b, n, h, p, dtype=dtype, device=k.device).transpose(1, 2)
