"""CBSA over tokens that are spread over processes: each has a softmax of its own, and their merger is exact.

A rank extracts from its tokens, P_r = exp(S_r - lse_r) and P_r V_r; one exchange makes R of these and tells
each its share w_r = exp(lse_r - lse), A_r = w_r P_r. What is M x P is then the same on every rank, which
contracts it and broadcasts to its tokens. Gradients run back through the same exchange: see
:mod:`cbsa_torch.ops.parallel`.

``"eager"`` stores P_r; ``"tiled"`` goes over tiles of tokens wherever it needs P_r, and stores nothing of its
size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cbsa_torch._core.precision import compute_dtype, no_autocast
from cbsa_torch.ops.cbsa.certified import limit
from cbsa_torch.ops.cbsa.contraction import contract
from cbsa_torch.ops.cbsa.inputs import CBSAInputs, tokens_per_representative
from cbsa_torch.ops.masking import masked_softmax, zero_rows
from cbsa_torch.ops.parallel import merged
from cbsa_torch.ops.softmax_attention import softmax_attention
from cbsa_torch.ops.token_weights import columns, spread_slice
from cbsa_torch.ops.token_weights import gram as gram_of_weights

TILE = 1024
"""Tokens per tile."""


def cbsa_on_slices(inputs: CBSAInputs, tiled: bool) -> Tensor:
    """The operator for inputs with ``parallel``; ``(B, H, N, P)`` in the dtype it is computed in."""
    parallel = inputs.parallel
    assert parallel is not None, "of tokens on several ranks"
    dtype = compute_dtype(inputs.tokens.dtype)
    scale, key_mask, exists = inputs.scale, inputs.key_mask, inputs.representative_mask
    with no_autocast(inputs.tokens):
        eta, kappa = (
            step.to(dtype)[:, None, None] for step in (inputs.step_representatives, inputs.step_tokens)
        )
        rep = zero_rows(inputs.representatives.to(dtype), exists).contiguous()
        keys = zero_rows(inputs.keys.to(dtype), key_mask).contiguous()
        values = keys
        if inputs.values is not inputs.keys:
            values = zero_rows(inputs.values.to(dtype), key_mask).contiguous()
        attention = (TiledAttention if tiled else StoredAttention)(scale * rep, keys, values, key_mask)
        sums = None
        if inputs.fraction is not None:
            sums = _grams(inputs, attention)
        elif inputs.relative and inputs.token_mask is not None:
            real = inputs.token_mask.sum(-1).to(dtype)
            sums = real[:, None, None, None].expand(*attention.lse.shape, 1)
        share, picked, others = merged(attention.lse, attention.picked, parallel, sums)
        if inputs.relative:
            everywhere = None if sums is None else others.sums.sum(0)[:, 0, 0, 0]
            kappa = kappa * tokens_per_representative(inputs, everywhere)
        extracted = zero_rows(rep + eta * picked, exists)
        contracted = contract(extracted, inputs.contraction, scale, inputs.eps, exists)
        if inputs.broadcast == "softmax":
            tokens = zero_rows(inputs.tokens.to(dtype), inputs.token_mask)
            if not parallel.length:  # nobody to give it to, but a gradient to take part in
                return tokens @ rep.mT @ (kappa * contracted)
            output = softmax_attention(tokens, rep, kappa * contracted, scale=scale, key_mask=exists)
            if key_mask is not None:  # without any real key on any rank there is nothing to attend to
                output = output.masked_fill(~others.any_real, 0.0)
            return zero_rows(output, inputs.token_mask)
        if inputs.fraction is None:
            return attention.give(share * kappa * contracted)
        longest = limit(*_total_grams(inputs, eta, others.shares, others.sums))
        step = -(inputs.fraction.to(dtype) * longest)[..., None, None] * contracted
        output = attention.give(share * eta * step)
        if inputs.token_weights is None:
            return output
        return output + spread_slice(inputs.token_weights, step, inputs.tokens.shape[2])


def _grams(inputs: CBSAInputs, attention: StoredAttention | TiledAttention) -> Tensor:
    """P P^T of this rank and, with Pi, P Pi^T and (a matrix) Pi Pi^T, side by side; ``(B, H, M, 1 to 3 M)``."""
    exists, weights = inputs.representative_mask, inputs.token_weights
    like = attention.lse.detach()
    of = None if weights is None else (lambda place: columns(weights, place, like))
    own, cross = attention.grams(of)
    own = own if exists is None else zero_rows(zero_rows(own, exists).mT, exists)
    parts = [own]
    if cross is not None:
        parts.append(zero_rows(cross, exists))
    if isinstance(weights, Tensor):
        parts.append(gram_of_weights(weights, own).expand_as(own))
    return torch.cat(parts, -1)


def _total_grams(inputs: CBSAInputs, eta: Tensor, shares: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """B B^T with B = Pi + eta A, and A A^T, over the tokens of all ranks, from the ``(R, ...)`` of each."""
    m = sums.shape[-2]
    own = (shares * shares.mT * sums[..., :m]).sum(0)
    if inputs.token_weights is None:
        return eta.detach().square() * own, own
    cross = eta.detach() * (shares * sums[..., m : 2 * m]).sum(0)
    if isinstance(inputs.token_weights, Tensor):
        fixed = sums[..., 2 * m :].sum(0)
    else:
        fixed = gram_of_weights(inputs.token_weights, own)
    return eta.detach().square() * own + cross + cross.mT + fixed, own


Columns = Callable[[slice], Tensor]


class StoredAttention:
    """The softmax of this rank's tokens, stored.

    Args:
        queries: ``(B, H, M, P)``, scaled.
        keys: ``(B, H, N, P)``, zero where masked.
        values: ``(B, H, N, P)``, zero where masked.
        mask: ``(B, N)`` bool.

    Attributes:
        lse: ``(B, H, M)``. picked: ``(B, H, M, P)``.
    """

    def __init__(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
        logits = queries @ keys.mT
        if mask is not None:
            mask = mask[:, None, None, :]
            logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
        self.lse = torch.logsumexp(logits, -1)
        self.weights = masked_softmax(logits, mask)
        self.picked = self.weights @ values

    def grams(self, of: Columns | None) -> tuple[Tensor, Tensor | None]:
        """P P^T and P Pi^T, without gradients; ``of`` gives columns of Pi."""
        weights = self.weights.detach()
        own = weights @ weights.mT
        return own, None if of is None else weights @ of(slice(0, weights.shape[-1])).mT

    def give(self, rows: Tensor) -> Tensor:
        """P^T ``rows``, ``(B, H, N, P)`` from ``(B, H, M, P)``."""
        return self.weights.mT @ rows


class TiledAttention:
    """The same, computed tile by tile wherever it is needed, in linear memory."""

    def __init__(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
        self.queries, self.keys, self.mask = queries, keys, mask
        self.lse, self.picked = _Pick.apply(queries, keys, values, mask)

    @torch.no_grad()
    def grams(self, of: Columns | None) -> tuple[Tensor, Tensor | None]:
        """As of :class:`StoredAttention`."""
        m = self.queries.shape[2]
        own, cross = (self.queries.new_zeros(*self.queries.shape[:2], m, m) for _ in range(2))
        for place in _places(self.keys):
            weights = _weights(self.queries, self.keys, self.mask, self.lse, place)
            own += weights @ weights.mT
            if of is not None:
                cross += weights @ of(place).mT
        return own, None if of is None else cross

    def give(self, rows: Tensor) -> Tensor:
        """As of :class:`StoredAttention`."""
        given: Tensor = _Give.apply(self.queries, self.keys, self.lse, rows, self.mask)
        return given


def _places(keys: Tensor) -> list[slice]:
    n = keys.shape[2]
    return [slice(i, min(i + TILE, n)) for i in range(0, n, TILE)]


def _logits(queries: Tensor, keys: Tensor, mask: Tensor | None, place: slice) -> Tensor:
    logits = queries @ keys[:, :, place].mT
    if mask is not None:
        logits.masked_fill_(~mask[:, None, None, place], torch.finfo(logits.dtype).min)
    return logits


def _weights(queries: Tensor, keys: Tensor, mask: Tensor | None, lse: Tensor, place: slice) -> Tensor:
    """exp(S - lse) of a tile, zero where masked."""
    weights = _logits(queries, keys, mask, place).sub_(lse[..., None]).exp_()
    return weights if mask is None else weights.masked_fill_(~mask[:, None, None, place], 0.0)


class _Pick(torch.autograd.Function):
    """``lse`` and P V."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        lse = queries.new_full(queries.shape[:3], -torch.inf)
        picked = torch.zeros_like(queries)
        for place in _places(keys):
            logits = _logits(queries, keys, mask, place)
            own = logits.logsumexp(-1)
            weights = logits.sub_(own[..., None]).exp_()  # of the tile; masked values are zero
            whole = torch.logaddexp(lse, own)
            picked *= (lse - whole).exp()[..., None]
            picked += (own - whole).exp()[..., None] * (weights @ values[:, :, place])
            lse = whole
        ctx.save_for_backward(queries, keys, None if values is keys else values, mask, lse, picked)
        return lse, picked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_lse: Tensor, d_picked: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, mask, lse, picked = ctx.saved_tensors
        shift = (d_lse - (d_picked * picked).sum(-1))[..., None]
        d_queries, d_keys = torch.zeros_like(queries), torch.zeros_like(keys)
        d_values = torch.zeros_like(keys)
        for place in _places(keys):
            weights = _weights(queries, keys, mask, lse, place)
            tile = (keys if values is None else values)[:, :, place]
            d_logits = (d_picked @ tile.mT).add_(shift).mul_(weights)
            d_queries += d_logits @ keys[:, :, place]
            d_keys[:, :, place] = d_logits.mT @ queries
            d_values[:, :, place] = weights.mT @ d_picked
        return d_queries, d_keys, d_values, None


class _Give(torch.autograd.Function):
    """P^T X, with P = exp(S - lse) a function of lse, too."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, lse: Tensor, rows: Tensor, mask: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(queries, keys, lse, rows, mask)
        given = torch.zeros_like(keys)
        for place in _places(keys):
            given[:, :, place] = _weights(queries, keys, mask, lse, place).mT @ rows
        return given

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, lse, rows, mask = ctx.saved_tensors
        d_queries, d_keys, d_rows = (torch.zeros_like(t) for t in (queries, keys, rows))
        for place in _places(keys):
            weights, d_given = _weights(queries, keys, mask, lse, place), gradient[:, :, place]
            d_rows += weights @ d_given
            d_logits = (rows @ d_given.mT).mul_(weights)
            d_queries += d_logits @ keys[:, :, place]
            d_keys[:, :, place] = d_logits.mT @ queries
        return d_queries, d_keys, -(rows * d_rows).sum(-1), d_rows, None
