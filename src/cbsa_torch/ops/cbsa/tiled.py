"""CBSA without its attention matrix: nothing of size M x N is kept, forward or backward.

Forward: one sweep over the tokens extracts with an online softmax, a second computes the attention again and
broadcasts. Backward: one sweep for T = A dO, and, the contraction's derivative in between, one for all the
rest. Saved are the inputs, the picked tokens R ``(B, H, M, P)`` and the log-sum-exp ``(B, H, M)``. The sweeps
are those of ``tiles``.

Low-precision inputs are computed in float32. One differentiation only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cbsa_torch._core.precision import compute_dtype, no_autocast
from cbsa_torch.ops.cbsa import tiles
from cbsa_torch.ops.cbsa.contraction import contract, contract_backward


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
    with no_autocast(keys):
        q, k, v = _wide(representatives, keys, values, key_mask, representative_mask)
        eta, kappa = (s.to(q.dtype)[:, None, None] for s in (step_representatives, step_tokens))
        picked, lse = tiles.extract(q, k, v, key_mask, scale)
        rep = _zero_rows(q + eta * picked, representative_mask)
        carried = kappa * contract(rep, contraction, scale, eps, representative_mask)
        output = tiles.broadcast(q, k, lse, carried, key_mask, scale)
        return _as_tokens(output, keys.dtype), picked.contiguous(), lse.contiguous()


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
    with no_autocast(keys):
        q, k, v = _wide(representatives, keys, values, key_mask, representative_mask)
        d_out = _zero_rows(gradient.to(q.dtype), key_mask)
        eta, kappa = (s.to(q.dtype)[:, None, None] for s in (step_representatives, step_tokens))
        rep = _zero_rows(q + eta * picked, representative_mask)
        c = contract(rep, contraction, scale, eps, representative_mask)
        collected = tiles.collect(q, k, lse, d_out, key_mask, scale)
        d_kappa = (collected * c).sum((0, 2, 3))
        d_rep = contract_backward(kappa * collected, rep, contraction, scale, eps, representative_mask)
        d_eta = (d_rep * picked).sum((0, 2, 3))
        d_q, d_k, d_v = tiles.differentiate(
            q,
            k,
            v,
            lse,
            key_mask,
            scale,
            carried=kappa * c,
            collected=collected,
            d_out=d_out,
            d_picked=eta * d_rep,
            picked=picked,
        )
        if values is None:
            d_k = d_k.add_(d_v)
        d_representatives = _zero_rows(d_rep + d_q, representative_mask)
        return (
            d_representatives.to(representatives.dtype).contiguous(),
            _as_tokens(d_k, keys.dtype),
            keys.new_empty(0) if values is None else _as_tokens(d_v, keys.dtype),
            d_eta.to(step_representatives.dtype),
            d_kappa.to(step_tokens.dtype),
        )


def _wide(
    representatives: Tensor,
    keys: Tensor,
    values: Tensor | None,
    key_mask: Tensor | None,
    representative_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V in the dtype to compute in, zero where masked; V is K itself if it is."""
    dtype = compute_dtype(keys.dtype)
    q = _zero_rows(representatives.to(dtype), representative_mask)
    k = _zero_rows(keys.to(dtype), key_mask)
    return q, k, k if values is None else _zero_rows(values.to(dtype), key_mask)


def _zero_rows(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows if mask is None else rows.masked_fill(~mask[:, None, :, None], 0.0)


def _as_tokens(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """``(B, H, N, P)``, laid out so that joining the heads is no copy."""
    return rows.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)


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
