"""Which implementation computes the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from cbsa_torch._core.autodiff import is_transformed
from cbsa_torch._core.precision import compute_dtype
from cbsa_torch._core.types import Impl
from cbsa_torch.ops.cbsa.operands import Operands
from cbsa_torch.ops.cbsa.reference import cbsa_reference, project_out
from cbsa_torch.ops.cbsa.tiled import tiled
from cbsa_torch.ops.cbsa.two_softmax import two_softmax

MANY_WEIGHTS = 2**20
"""Weights B * H * M * N from which ``"auto"`` goes over tiles if the output projection folds into them; four
times as many if not. Below, what tiles save does not pay for their overhead (``cbsa bench layers``)."""


def run(o: Operands, impl: Impl, out_weight: Tensor | None = None, out_bias: Tensor | None = None) -> Tensor:
    """Compute the operator by ``impl``: ``(B, H, N, P)`` in the dtype of the tokens, or projected out."""
    if impl == "auto":
        impl = fastest(o, out_weight)
    elif impl != "eager" and is_transformed():
        raise ValueError(
            f"impl={impl!r} is not for torch.func or forward-mode differentiation; use impl='eager' or 'auto'"
        )
    if impl != "eager" and o.attention is not None:
        raise ValueError(f"impl={impl!r} computes the attention itself; attention needs impl='eager'")
    if impl == "tiled" and not o.fresh_broadcast:
        if out_weight is not None and folds(o, out_weight):
            return tiled(*_tensors(o), out_weight, out_bias, o.contraction, o.scale, o.eps)[0]
        heads = tiled(*_tensors(o), None, None, o.contraction, o.scale, o.eps)[0]
    elif impl == "tiled":
        heads = two_softmax(o)
    elif impl == "triton":
        if o.fresh_broadcast:
            raise ValueError("impl='triton' broadcasts with the attention it extracted; use 'tiled' or 'eager'")
        from cbsa_torch.ops.cbsa.fused import fused

        heads = fused(*_tensors(o), o.contraction, o.scale, o.eps)[0]
    else:
        heads = cbsa_reference(**o._asdict()).output
    heads = heads.to(o.tokens.dtype)
    return heads if out_weight is None else project_out(heads, out_weight, out_bias)


def fastest(o: Operands, out_weight: Tensor | None) -> Impl:
    """What ``"auto"`` is: tiles on the CPU, if the attention matrix is large; else the equations.

    Elsewhere nothing was measured yet. ``torch.export`` should leave no operator of ours in a program, and
    ``torch.func`` and forward-mode differentiation know the equations only.
    """
    if o.attention is not None or o.fresh_broadcast or torch.compiler.is_exporting() or is_transformed():
        return "eager"
    b, h, m, _ = o.representatives.shape
    many = MANY_WEIGHTS if out_weight is not None and folds(o, out_weight) else 4 * MANY_WEIGHTS
    large = b * h * m * o.keys.shape[2] >= many
    return "tiled" if large and o.tokens.device.type == "cpu" else "eager"


def folds(o: Operands, out_weight: Tensor) -> bool:
    """Whether it is fewer operations to project the contractions than the heads of every token.

    Per head, with C output channels: N M C products to broadcast projected contractions and P M C to project
    them, against N P M to broadcast and N P C to project afterwards.
    """
    if torch.compiler.is_exporting():  # a comparison would limit N in the exported program
        return False
    (_, _, m, p), n, c = o.representatives.shape, o.keys.shape[2], out_weight.shape[0]
    return (n + p) * m * c < n * p * (m + c)


def _tensors(o: Operands) -> tuple[Tensor | None, ...]:
    return (
        o.representatives,
        o.keys,
        None if o.values is o.keys else o.values,
        _per_head(o.step_representatives, o),
        _per_head(o.step_tokens, o),
        o.key_mask,
        o.representative_mask,
    )


def _per_head(step: Tensor | float, o: Operands) -> Tensor:
    """A step size as ``(H,)``."""
    if isinstance(step, Tensor):
        return step
    dtype = compute_dtype(o.tokens.dtype)
    return torch.full((o.tokens.shape[1],), float(step), dtype=dtype, device=o.tokens.device)
