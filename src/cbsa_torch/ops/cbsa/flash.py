"""The sweeps over tokens by PyTorch's fused attention kernels for the CPU.

All four are softmax attention, or a step away from it. With A = softmax over tokens of s Q K^T and its
log-sum-exp l: extraction A V and the backward's A dO are attention as it is. The broadcast A^T C has a softmax
over the wrong axis: sum_i exp(s q_i k_n - l_i) c_i is attention of tokens to representatives with logits
shifted by -l_i, times its own normaliser. And the gradients of A dO and of A V, fed with the gradients of
both, add up to those of the whole.

Tensors are ``(B, H, rows, P)`` in float32 or float64, rows of masked tokens zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def extract(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """R = A V and the log-sum-exp ``(B, H, M)``; zero and +inf for items without any real token."""
    picked, lse = _forward(q, k, v, attn_mask=_bias(q, k, mask), scale=scale)
    if mask is not None:
        lse = lse.masked_fill(~mask.any(-1)[:, None, None], torch.inf)
    return picked, lse


def broadcast(q: Tensor, k: Tensor, lse: Tensor, carried: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """O = A^T (kappa C)."""
    shift = -lse[:, :, None, :].expand(-1, -1, k.shape[2], -1)  # (B, H, N, M), nothing stored
    output, normalizer = _forward(k, q, carried, attn_mask=shift, scale=scale)
    output *= normalizer.exp()[..., None]
    return output if mask is None else output.masked_fill_(~mask[:, None, :, None], 0.0)


def collect(q: Tensor, k: Tensor, lse: Tensor, d_out: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """T = A dO."""
    return _forward(q, k, d_out, attn_mask=_bias(q, k, mask), scale=scale)[0]


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
    """Gradients of Q (through A), K and V from those of A dO (kappa C) and of A V (dR)."""
    bias = _bias(q, k, mask)
    finite = lse if mask is None else lse.masked_fill(lse == torch.inf, 0.0)
    options = {"attn_mask": bias, "scale": scale}
    dq, dk, _ = _backward(carried, q, k, d_out, collected, finite, 0.0, False, **options)
    dq_extract, dk_extract, dv = _backward(d_picked, q, k, v, picked, finite, 0.0, False, **options)
    return dq + dq_extract, dk.add_(dk_extract), dv


def _bias(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    """-inf at masked tokens, ``(B, H, M, N)`` without storage."""
    if mask is None:
        return None
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    return bias[:, None, None, :].expand(-1, q.shape[1], q.shape[2], -1)
