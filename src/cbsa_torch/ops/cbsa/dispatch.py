"""Which implementation computes the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from cbsa_torch._core.precision import compute_dtype
from cbsa_torch._core.types import Impl
from cbsa_torch.ops.cbsa.operands import Operands
from cbsa_torch.ops.cbsa.reference import cbsa_reference
from cbsa_torch.ops.cbsa.tiled import tiled
from cbsa_torch.ops.cbsa.two_softmax import two_softmax


def run(operands: Operands, impl: Impl) -> Tensor:
    """Compute the operator by ``impl``; ``(B, H, N, P)`` in the dtype of the tokens."""
    if impl == "auto":
        # Exporters translate PyTorch's own operators only.
        impl = "eager" if operands.attention is not None or torch.compiler.is_exporting() else "tiled"
    if impl == "eager":
        return cbsa_reference(**operands._asdict()).output.to(operands.tokens.dtype)
    if operands.attention is not None:
        raise ValueError(f"impl={impl!r} computes the attention itself; attention needs impl='eager'")
    if operands.fresh_broadcast:
        return two_softmax(operands).to(operands.tokens.dtype)
    return _run_tiled(operands)


def _run_tiled(o: Operands) -> Tensor:
    output, _, _ = tiled(
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
