"""Which implementation computes the operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cbsa_torch._core.precision import compute_dtype
from cbsa_torch._core.types import Impl
from cbsa_torch.ops.cbsa.operands import Operands
from cbsa_torch.ops.cbsa.reference import cbsa_reference
from cbsa_torch.ops.cbsa.tiled import tiled
from cbsa_torch.ops.cbsa.two_softmax import two_softmax


def run(o: Operands, impl: Impl) -> Tensor:
    """Compute the operator by ``impl``; ``(B, H, N, P)`` in the dtype of the tokens.

    ``"auto"`` is ``"eager"``, on the CPU the fastest below some 9,000 tokens (``benchmarks/layers.py``);
    ``"triton"`` was not run on a GPU yet.
    """
    if impl in ("auto", "eager"):
        return cbsa_reference(**o._asdict()).output.to(o.tokens.dtype)
    if o.attention is not None:
        raise ValueError(f"impl={impl!r} computes the attention itself; attention needs impl='eager'")
    if impl == "triton":
        if o.fresh_broadcast:
            raise ValueError("impl='triton' broadcasts with the attention it extracted; use 'tiled' or 'eager'")
        from cbsa_torch.ops.cbsa.fused import fused

        return _run(fused, o)
    if o.fresh_broadcast:
        return two_softmax(o).to(o.tokens.dtype)
    return _run(tiled, o)


def _run(op: Callable[..., tuple[Tensor, Tensor, Tensor]], o: Operands) -> Tensor:
    output, _, _ = op(
        o.representatives,
        o.keys,
        None if o.values is o.keys else o.values,
        _per_head(o.step_representatives, o),
        _per_head(o.step_tokens, o),
        o.key_mask,
        o.representative_mask,
        o.contraction,
        o.scale,
        o.eps,
    )
    return output


def _per_head(step: Tensor | float, o: Operands) -> Tensor:
    """A step size as ``(H,)``."""
    if isinstance(step, Tensor):
        return step
    dtype = compute_dtype(o.tokens.dtype)
    return torch.full((o.tokens.shape[1],), float(step), dtype=dtype, device=o.tokens.device)
