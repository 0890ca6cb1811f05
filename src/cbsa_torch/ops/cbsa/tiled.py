"""CBSA over tiles of tokens: nothing of size M x N is kept, forward or backward.

Forward: one sweep extracts with an online softmax, a second recomputes the attention tile by tile and
broadcasts. Backward: one sweep for T = A dO, and, the contraction's derivative in between, one for all the
rest; D_i = sum_n A_in dA_in comes from tensors of size M x P, so that no third sweep is needed. Saved for
backward are the inputs, the picked tokens R ``(B, H, M, P)`` and the log-sum-exp ``(B, H, M)``.

Low-precision inputs are computed in float32 tile by tile. One differentiation only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cbsa_torch._core.precision import compute_dtype, no_autocast
from cbsa_torch.ops.cbsa.contraction import contract, contract_backward

TILE = 1024
"""Tokens per tile: H x M x 1024 logits of a usual layer stay in a CPU's L2 cache."""


@torch.library.custom_op("cbsa_torch::tiled", mutates_args=())
def tiled(
    representatives: Tensor,
    keys: Tensor,
    values: Tensor | None,
    step_representatives: Tensor,
    step_tokens: Tensor,
    key_mask: Tensor | None,
    representative_mask: Tensor | None,
    contraction: str,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``(B, H, N, P)``, picked tokens R ``(B, H, M, P)`` and log-sum-exp ``(B, H, M)``.

    Args:
        representatives: ``(B, H, M, P)``.
        keys: ``(B, H, N, P)``.
        values: ``(B, H, N, P)``, or None if they are the keys.
        step_representatives: eta ``(H,)``.
        step_tokens: kappa ``(H,)``.
        key_mask: ``(B, N)`` bool.
        representative_mask: ``(B, M)`` bool.
        contraction: ``"softmax"``, ``"exact"`` or ``"none"``.
        scale: factor on the logits.
        eps: epsilon of the exact contraction.
    """
    dtype = compute_dtype(keys.dtype)
    b, h, n, p = keys.shape
    with no_autocast(keys):
        q = _zero_rows(representatives.to(dtype), representative_mask)
        eta, kappa = (s.to(dtype)[:, None, None] for s in (step_representatives, step_tokens))
        queries = scale * q
        picked = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
        single = n <= TILE
        attention = []
        for i in range(b):
            kept = _extract(queries[i], _Item(keys, values, key_mask, i, dtype), picked[i], lse[i], single)
            attention.append(kept)
        rep = _zero_rows(q + eta * picked, representative_mask)
        carried = kappa * contract(rep, contraction, scale, eps, representative_mask)
        output = torch.empty(b, n, h, p, dtype=keys.dtype, device=keys.device).transpose(1, 2)
        for i in range(b):
            item = _Item(keys, values, key_mask, i, dtype)
            for tile in _tiles(n):
                a = attention[i] if single else _attention(queries[i], item, lse[i], tile)
                output[i, :, tile] = a.mT @ carried[i]
    return output, picked, lse


class _Item:
    """One batch item's keys, values and mask, read tile by tile."""

    def __init__(
        self, keys: Tensor, values: Tensor | None, mask: Tensor | None, i: int, dtype: torch.dtype
    ) -> None:
        self.raw_keys = keys[i]
        self.raw_values = None if values is None else values[i]
        self.mask = None if mask is None else mask[i]
        self.dtype = dtype

    def keys(self, tile: slice) -> Tensor:
        """``(H, T, P)``, zero where masked: padding may hold NaN."""
        return self._read(self.raw_keys, tile)

    def values(self, tile: slice, keys: Tensor) -> Tensor:
        """``(H, T, P)``; the keys again if there are no others."""
        return keys if self.raw_values is None else self._read(self.raw_values, tile)

    def _read(self, rows: Tensor, tile: slice) -> Tensor:
        part = rows[:, tile].to(self.dtype)
        return part if self.mask is None else part.masked_fill(~self.mask[tile, None], 0.0)

    def logits(self, queries: Tensor, keys: Tensor, tile: slice) -> Tensor:
        """``(H, M, T)``, -inf where masked."""
        logits = queries @ keys.mT
        return logits if self.mask is None else logits.masked_fill_(~self.mask[tile], -torch.inf)


def _tiles(n: int) -> list[slice]:
    return [slice(start, min(start + TILE, n)) for start in range(0, n, TILE)]


def _zero_rows(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows if mask is None else rows.masked_fill(~mask[:, None, :, None], 0.0)


def _extract(queries: Tensor, item: _Item, picked: Tensor, lse: Tensor, keep: bool) -> Tensor | None:
    """Online softmax over tiles; writes R and the log-sum-exp, and returns A if it is to be kept."""
    h, m, p = queries.shape
    highest = torch.full((h, m, 1), -torch.inf, dtype=queries.dtype, device=queries.device)
    total = torch.zeros_like(highest)
    weights = None
    picked.zero_()
    for tile in _tiles(item.raw_keys.shape[1]):
        keys = item.keys(tile)
        weights = item.logits(queries, keys, tile)
        now = torch.maximum(highest, weights.amax(-1, keepdim=True))
        shift = now.masked_fill(now == -torch.inf, 0.0)  # a row that is masked so far
        weights = weights.sub_(shift).exp_()
        decay = (highest - shift).exp_()
        total = decay * total + weights.sum(-1, keepdim=True)
        picked.mul_(decay).add_(weights @ item.values(tile, keys))
        highest = now
    empty = total == 0
    inverse = total.masked_fill(empty, 1.0).reciprocal_().masked_fill_(empty, 0.0)
    picked.mul_(inverse)
    # +inf makes every later exp(S - lse) zero, without a special case.
    lse.copy_((highest + total.log()).masked_fill_(empty, torch.inf)[..., 0])
    return weights.mul_(inverse) if keep and weights is not None else None


def _attention(queries: Tensor, item: _Item, lse: Tensor, tile: slice, keys: Tensor | None = None) -> Tensor:
    """A of a tile again, ``(H, M, T)``."""
    logits = item.logits(queries, item.keys(tile) if keys is None else keys, tile)
    return logits.sub_(lse[..., None]).exp_()


@tiled.register_fake
def _(
    representatives: Tensor,
    keys: Tensor,
    values: Tensor | None,
    step_representatives: Tensor,
    step_tokens: Tensor,
    key_mask: Tensor | None,
    representative_mask: Tensor | None,
    contraction: str,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    b, h, n, p = keys.shape
    dtype = compute_dtype(keys.dtype)
    output = keys.new_empty(b, n, h, p).transpose(1, 2)
    picked = representatives.new_empty(representatives.shape, dtype=dtype)
    return output, picked, representatives.new_empty(representatives.shape[:3], dtype=dtype)


@torch.library.custom_op("cbsa_torch::tiled_backward", mutates_args=())
def tiled_backward(
    gradient: Tensor,
    representatives: Tensor,
    keys: Tensor,
    values: Tensor | None,
    step_representatives: Tensor,
    step_tokens: Tensor,
    key_mask: Tensor | None,
    representative_mask: Tensor | None,
    picked: Tensor,
    lse: Tensor,
    contraction: str,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of representatives, keys, values (empty if they are the keys), eta and kappa."""
    dtype = compute_dtype(keys.dtype)
    b, h, n, p = keys.shape
    with no_autocast(keys):
        q = _zero_rows(representatives.to(dtype), representative_mask)
        eta, kappa = (s.to(dtype)[:, None, None] for s in (step_representatives, step_tokens))
        queries = scale * q
        rep = _zero_rows(q + eta * picked, representative_mask)
        c = contract(rep, contraction, scale, eps, representative_mask)

        collected = torch.zeros_like(q)  # T = A dO, (B, H, M, P)
        kept: list[Tensor | None] = [None] * b
        for i in range(b):
            item = _Item(keys, values, key_mask, i, dtype)
            for tile in _tiles(n):
                a = _attention(queries[i], item, lse[i], tile)
                collected[i] += a @ gradient[i, :, tile].to(dtype)
                kept[i] = a if n <= TILE else None
        d_kappa = (collected * c).sum((0, 2, 3))
        d_c = kappa * collected
        d_rep = contract_backward(d_c, rep, contraction, scale, eps, representative_mask)
        d_eta = (d_rep * picked).sum((0, 2, 3))
        d_picked = eta * d_rep
        carried = kappa * c
        row_sums = (c * d_c).sum(-1, keepdim=True) + (d_picked * picked).sum(-1, keepdim=True)  # D

        d_queries = torch.zeros_like(q)
        d_keys = torch.empty(b, n, h, p, dtype=keys.dtype, device=keys.device).transpose(1, 2)
        d_values = torch.empty_like(d_keys) if values is not None else keys.new_empty(0)
        for i in range(b):
            item = _Item(keys, values, key_mask, i, dtype)
            for tile in _tiles(n):
                k = item.keys(tile)
                known = kept[i]
                a = _attention(queries[i], item, lse[i], tile, k) if known is None else known
                d_a = carried[i] @ gradient[i, :, tile].to(dtype).mT
                d_a = torch.baddbmm(d_a, d_picked[i], item.values(tile, k).mT)
                d_logits = d_a.sub_(row_sums[i]).mul_(a)  # (H, M, T)
                d_queries[i] += d_logits @ k
                if values is None:
                    d_keys[i, :, tile] = torch.baddbmm(a.mT @ d_picked[i], d_logits.mT, queries[i])
                else:
                    d_values[i, :, tile] = a.mT @ d_picked[i]
                    d_keys[i, :, tile] = d_logits.mT @ queries[i]
        d_representatives = _zero_rows(d_rep + scale * d_queries, representative_mask)
    return (
        d_representatives.to(representatives.dtype),
        d_keys,
        d_values,
        d_eta.to(step_representatives.dtype),
        d_kappa.to(step_tokens.dtype),
    )


@tiled_backward.register_fake
def _(
    gradient: Tensor,
    representatives: Tensor,
    keys: Tensor,
    values: Tensor | None,
    step_representatives: Tensor,
    step_tokens: Tensor,
    key_mask: Tensor | None,
    representative_mask: Tensor | None,
    picked: Tensor,
    lse: Tensor,
    contraction: str,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, h, n, p = keys.shape
    d_keys = keys.new_empty(b, n, h, p).transpose(1, 2)
    return (
        torch.empty_like(representatives, memory_format=torch.contiguous_format),
        d_keys,
        torch.empty_like(d_keys) if values is not None else keys.new_empty(0),
        torch.empty_like(step_representatives),
        torch.empty_like(step_tokens),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, contraction, scale, eps = inputs
    _, picked, lse = output
    ctx.mark_non_differentiable(picked, lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, picked, lse)
    ctx.options = contraction, scale, eps


def _differentiate(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 10
    *inputs, picked, lse = ctx.saved_tensors
    d_rep, d_keys, d_values, d_eta, d_kappa = tiled_backward(gradient, *inputs, picked, lse, *ctx.options)
    d_values = None if inputs[2] is None else d_values
    return d_rep, d_keys, d_values, d_eta, d_kappa, None, None, None, None, None


tiled.register_autograd(_differentiate, setup_context=_save)
