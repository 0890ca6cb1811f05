"""CBSA with a fresh softmax to broadcast: two fused softmax attentions around the contraction.

No attention matrix is shared between extraction and broadcast, so PyTorch's fused attention computes both,
and neither of them is stored.
"""

from __future__ import annotations

from torch import Tensor

from cbsa_torch._core.precision import compute_dtype, no_autocast
from cbsa_torch.ops.cbsa.contraction import contract, zero_rows
from cbsa_torch.ops.cbsa.operands import Operands
from cbsa_torch.ops.softmax_attention import softmax_attention


def two_softmax(o: Operands) -> Tensor:
    """The operator for ``broadcast="softmax"``; ``(B, H, N, P)`` in the dtype it is computed in."""
    dtype = compute_dtype(o.tokens.dtype)
    with no_autocast(o.tokens):
        tokens, rep, keys, values = (t.to(dtype) for t in (o.tokens, o.representatives, o.keys, o.values))
        eta, kappa = (
            s.to(dtype)[:, None, None] if isinstance(s, Tensor) else s
            for s in (o.step_representatives, o.step_tokens)
        )
        tokens, rep = zero_rows(tokens, o.token_mask), zero_rows(rep, o.representative_mask)
        picked = softmax_attention(rep, keys, values, scale=o.scale, key_mask=o.key_mask)
        extracted = zero_rows(rep + eta * picked, o.representative_mask)
        contracted = kappa * contract(extracted, o.contraction, o.scale, o.eps, o.representative_mask)
        output = softmax_attention(tokens, rep, contracted, scale=o.scale, key_mask=o.representative_mask)
        output = zero_rows(output, o.token_mask)
        if o.key_mask is not None:  # without any real key there is nothing to attend to
            output = output.masked_fill(~o.key_mask.any(-1)[:, None, None, None], 0.0)
    return output
