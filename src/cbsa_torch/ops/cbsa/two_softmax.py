"""CBSA with a fresh softmax to broadcast: two fused softmax attentions around the contraction.

No attention matrix is shared between extraction and broadcast, so PyTorch's fused attention computes both,
and neither of them is stored.
"""

from __future__ import annotations

from torch import Tensor

from cbsa_torch._core.precision import compute_dtype, no_autocast
from cbsa_torch.ops.cbsa.contraction import contract
from cbsa_torch.ops.cbsa.inputs import CBSAInputs
from cbsa_torch.ops.masking import zero_rows
from cbsa_torch.ops.softmax_attention import softmax_attention


def two_softmax(inputs: CBSAInputs) -> Tensor:
    """The operator for ``broadcast="softmax"``; ``(B, H, N, P)`` in the dtype it is computed in."""
    dtype = compute_dtype(inputs.tokens.dtype)
    scale, key_mask, representative_mask = inputs.scale, inputs.key_mask, inputs.representative_mask
    with no_autocast(inputs.tokens):
        tokens = zero_rows(inputs.tokens.to(dtype), inputs.token_mask)
        rep = zero_rows(inputs.representatives.to(dtype), representative_mask)
        eta, kappa = (
            step.to(dtype)[:, None, None] for step in (inputs.step_representatives, inputs.step_tokens)
        )
        picked = softmax_attention(
            rep, inputs.keys.to(dtype), inputs.values.to(dtype), scale=scale, key_mask=key_mask
        )
        extracted = zero_rows(rep + eta * picked, representative_mask)
        contracted = kappa * contract(extracted, inputs.contraction, scale, inputs.eps, representative_mask)
        output = softmax_attention(tokens, rep, contracted, scale=scale, key_mask=representative_mask)
        output = zero_rows(output, inputs.token_mask)
        if key_mask is not None:  # without any real key there is nothing to attend to
            output = output.masked_fill(~key_mask.any(-1)[:, None, None, None], 0.0)
    return output
