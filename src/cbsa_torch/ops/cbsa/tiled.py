"""CBSA over tiles of tokens: nothing of size M x N is kept, forward or backward.

Forward: one pass over the tokens extracts, a second computes the attention again and broadcasts. Backward: one
pass for A dO, and, the contraction's derivative in between, one for all the rest. Saved are the inputs, the
picked tokens R ``(B, H, M, P)`` and a share per representative and tile. The passes are those of ``tiles``.

Low-precision inputs are computed in float32, except for products with an output projection in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cbsa_torch._core.precision import compute_dtype, no_autocast
from cbsa_torch.ops.cbsa import tiles
from cbsa_torch.ops.cbsa.contraction import contract, contract_backward, zero_rows
from cbsa_torch.ops.cbsa.differentiable import like_tokens, register


@torch.library.custom_op("cbsa_torch::tiled", mutates_args=())
def tiled(
    representatives: Tensor,
    keys: Tensor,
    values: Tensor | None,
    step_representatives: Tensor,
    step_tokens: Tensor,
    key_mask: Tensor | None,
    representative_mask: Tensor | None,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    contraction: str,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, picked tokens R ``(B, H, M, P)`` and shares ``(B, H, M, at least tiles)``.

    Args:
        representatives: ``(B, H, M, P)``.
        keys: ``(B, H, N, P)``.
        values: ``(B, H, N, P)``, or None if they are the keys.
        step_representatives: eta ``(H,)``.
        step_tokens: kappa ``(H,)``.
        key_mask: ``(B, N)`` bool.
        representative_mask: ``(B, M)`` bool.
        out_weight: ``(C, H * P)`` projects out: the output is ``(B, N, C)`` instead of ``(B, H, N, P)``.
        out_bias: ``(C,)``.
        contraction: ``"softmax"``, ``"exact"`` or ``"none"``.
        scale: factor on the logits.
        eps: epsilon of the exact contraction.
    """
    with no_autocast(keys):
        dtype = compute_dtype(keys.dtype)
        q = zero_rows(representatives.to(dtype), representative_mask)
        eta, kappa = (s.to(dtype)[:, None, None] for s in (step_representatives, step_tokens))
        bias = None if out_bias is None else out_bias.to(keys.dtype)
        output, picked, shares = _results(representatives, keys, out_weight)
        for group in tiles.groups(keys.shape[0], keys.shape[2]):
            part = tiles.Tiles(q[group], keys[group], _of(values, group), _of(key_mask, group), scale)
            picked[group], shares[group, ..., : tiles.count(keys.shape[2])] = part.extract()
            exists = _of(representative_mask, group)
            rep = zero_rows(q[group] + eta * picked[group], exists)
            carried = kappa * contract(rep, contraction, scale, eps, exists)
            if out_weight is not None:
                carried = carried @ _per_head(out_weight, keys).to(dtype)
            part.broadcast(carried, bias, output[group])
        return output, picked, shares


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
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    picked: Tensor,
    shares: Tensor,
    contraction: str,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of all floating-point inputs; what was not given gets an empty tensor."""
    with no_autocast(keys):
        dtype = compute_dtype(keys.dtype)
        q = zero_rows(representatives.to(dtype), representative_mask)
        eta, kappa = (s.to(dtype)[:, None, None] for s in (step_representatives, step_tokens))
        weight = None if out_weight is None else _per_head(out_weight, keys).to(dtype)  # (H, P, C)
        d_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        d_keys = like_tokens(keys)
        d_values = None if values is None else like_tokens(keys)
        d_eta, d_kappa = (torch.zeros(keys.shape[1], dtype=dtype, device=keys.device) for _ in range(2))
        d_weight = torch.zeros_like(q.new_empty(0) if weight is None else weight)
        for group in tiles.groups(keys.shape[0], keys.shape[2]):
            part = tiles.Tiles(
                q[group], keys[group], _of(values, group), _of(key_mask, group), scale, shares[group]
            )
            exists = _of(representative_mask, group)
            rep = zero_rows(q[group] + eta * picked[group], exists)
            c = contract(rep, contraction, scale, eps, exists)
            carried = kappa * c if weight is None else (kappa * c) @ weight
            d_carried = collected = part.collect(gradient[group])
            if weight is not None:
                d_carried = collected @ weight.mT
                d_weight += ((kappa * c).mT @ collected).sum(0)
            d_kappa += (d_carried * c).sum((0, 2, 3))
            d_rep = contract_backward(kappa * d_carried, rep, contraction, scale, eps, exists)
            d_eta += (d_rep * picked[group]).sum((0, 2, 3))
            d_q[group] = d_rep + part.differentiate(
                gradient[group],
                carried=carried,
                collected=collected,
                d_picked=eta * d_rep,
                picked=picked[group],
                d_keys=d_keys[group],
                d_values=_of(d_values, group),
            )
        return (
            zero_rows(d_q, representative_mask).to(representatives.dtype).contiguous(),
            d_keys,
            keys.new_empty(0) if d_values is None else d_values,
            d_eta.to(step_representatives.dtype),
            d_kappa.to(step_tokens.dtype),
            keys.new_empty(0) if out_weight is None else d_weight.flatten(0, 1).t().to(out_weight).contiguous(),
            keys.new_empty(0) if out_bias is None else gradient.sum((0, 1), dtype=dtype).to(out_bias),
        )


def _per_head(out_weight: Tensor, keys: Tensor) -> Tensor:
    """``(C, H * P)`` as ``(H, P, C)``."""
    return out_weight.t().unflatten(0, (keys.shape[1], keys.shape[3]))


def _of(rows: Tensor | None, group: slice) -> Tensor | None:
    return None if rows is None else rows[group]


def _results(representatives: Tensor, keys: Tensor, out_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for what the forward pass returns."""
    b, h, n, _ = keys.shape
    dtype = compute_dtype(keys.dtype)
    output = like_tokens(keys) if out_weight is None else keys.new_empty(b, n, out_weight.shape[0])
    shares = keys.new_zeros(b, h, representatives.shape[2], tiles.most(n), dtype=dtype)
    return output, torch.empty_like(representatives, dtype=dtype, memory_format=torch.contiguous_format), shares


@tiled.register_fake
def _(
    representatives: Tensor,
    keys: Tensor,
    values: Tensor | None,
    step_representatives: Tensor,
    step_tokens: Tensor,
    key_mask: Tensor | None,
    representative_mask: Tensor | None,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    contraction: str,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _results(representatives, keys, out_weight)


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
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    picked: Tensor,
    shares: Tensor,
    contraction: str,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def contiguous(like: Tensor | None) -> Tensor:
        return keys.new_empty(0) if like is None else like.new_empty(like.shape)

    return (
        contiguous(representatives),
        like_tokens(keys),
        keys.new_empty(0) if values is None else like_tokens(keys),
        contiguous(step_representatives),
        contiguous(step_tokens),
        contiguous(out_weight),
        contiguous(out_bias),
    )


register(tiled, tiled_backward)
