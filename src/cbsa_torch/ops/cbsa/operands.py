"""The operator's arguments, checked and completed: what every implementation is given."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cbsa_torch._core.checks import (
    check_choice,
    check_floating,
    check_mask,
    check_number,
    check_positive,
    check_same_kind,
    check_shape,
)
from cbsa_torch._core.types import BROADCASTS, CONTRACTIONS, Broadcast, Contraction


class Operands(NamedTuple):
    """Checked arguments of :func:`cbsa_torch.ops.cbsa`, defaults filled in."""

    tokens: Tensor
    representatives: Tensor
    keys: Tensor
    """The tokens themselves, the same object, if none were given."""
    values: Tensor
    """The keys themselves, the same object, if none were given."""
    attention: Tensor | None
    step_representatives: Tensor | float
    step_tokens: Tensor | float
    scale: float
    contraction: Contraction
    fresh_broadcast: bool
    eps: float
    token_mask: Tensor | None
    key_mask: Tensor | None
    """``token_mask`` if none was given."""
    representative_mask: Tensor | None


def check_operands(
    tokens: Tensor,
    representatives: Tensor,
    *,
    keys: Tensor | None,
    values: Tensor | None,
    attention: Tensor | None,
    step_representatives: Tensor | float,
    step_tokens: Tensor | float,
    scale: float | None,
    contraction: Contraction,
    broadcast: Broadcast,
    eps: float,
    token_mask: Tensor | None,
    key_mask: Tensor | None,
    representative_mask: Tensor | None,
) -> Operands:
    """Refuse what does not fit, by name, and fill in the defaults."""
    check_choice("contraction", contraction, CONTRACTIONS)
    check_choice("broadcast", broadcast, BROADCASTS)
    check_positive("eps", eps)
    if scale is not None:
        check_number("scale", scale)
    check_floating("tokens", tokens)
    check_shape("tokens", tokens, (None, None, None, None), "(B, H, N, P)")
    b, h, n, p = tokens.shape
    check_floating("representatives", representatives)
    check_shape("representatives", representatives, (b, h, None, p), "(B, H, M, P)")
    check_same_kind("representatives", representatives, "tokens", tokens)
    if attention is not None:
        check_floating("attention", attention)
        check_shape("attention", attention, (b, h, representatives.shape[2], n), "(B, H, M, N)")
        check_same_kind("attention", attention, "tokens", tokens)
        if keys is not None or values is not None or broadcast != "shared" or key_mask is not None:
            raise ValueError(
                "attention is used to broadcast, and nothing is extracted: it excludes keys, values, key_mask "
                "and broadcast='softmax'"
            )
        if isinstance(step_representatives, Tensor) or step_representatives != 1.0:
            raise ValueError("step_representatives has no effect beside attention: nothing is extracted")
    if keys is None:
        keys = tokens
    else:
        check_floating("keys", keys)
        check_shape("keys", keys, (b, h, None, p), "(B, H, K, P)")
        check_same_kind("keys", keys, "tokens", tokens)
    if values is None:
        values = keys
    else:
        check_floating("values", values)
        check_shape("values", values, (b, h, keys.shape[2], p), "(B, H, K, P)")
        check_same_kind("values", values, "tokens", tokens)
    if keys.shape[2] != n:
        if broadcast == "shared":
            raise ValueError(
                f"keys must have as many rows as tokens ({n}) for broadcast='shared', got {keys.shape[2]}; "
                "use broadcast='softmax' for cross-attention"
            )
        if token_mask is not None and key_mask is None:
            raise ValueError(
                f"key_mask is required beside token_mask when keys have another length ({keys.shape[2]}) "
                f"than tokens ({n}); pass all True if every key is real"
            )
    if token_mask is not None:
        check_mask("token_mask", token_mask, (b, n), "(B, N)", "a real token")
    if key_mask is not None:
        check_mask("key_mask", key_mask, (b, keys.shape[2]), "(B, K)", "a real key")
    else:
        key_mask = token_mask
    if representative_mask is not None:
        check_mask(
            "representative_mask",
            representative_mask,
            (b, representatives.shape[2]),
            "(B, M)",
            "a real representative",
        )
    _check_step("step_representatives", step_representatives, h)
    _check_step("step_tokens", step_tokens, h)
    return Operands(
        tokens,
        representatives,
        keys,
        values,
        attention,
        step_representatives,
        step_tokens,
        scale=p**-0.5 if scale is None else scale,
        contraction=contraction,
        fresh_broadcast=broadcast == "softmax",
        eps=eps,
        token_mask=token_mask,
        key_mask=key_mask,
        representative_mask=representative_mask,
    )


def check_projection(o: Operands, out_weight: Tensor | None, out_bias: Tensor | None) -> None:
    """Refuse a projection out of the subspaces that does not fit."""
    if out_weight is None:
        if out_bias is not None:
            raise ValueError("out_bias needs out_weight")
        return
    _, h, _, p = o.tokens.shape
    check_floating("out_weight", out_weight)
    check_shape("out_weight", out_weight, (None, h * p), "(C, H * P)")
    for name, given in (("out_weight", out_weight), ("out_bias", out_bias)):
        if given is not None and given.device != o.tokens.device:
            raise ValueError(f"{name} must be on the device of tokens, {o.tokens.device}, got {given.device}")
    if out_bias is not None:
        check_floating("out_bias", out_bias)
        check_shape("out_bias", out_bias, (out_weight.shape[0],), "(C,)")


def _check_step(name: str, step: Tensor | float, num_heads: int) -> None:
    if isinstance(step, Tensor):
        check_floating(name, step)
        check_shape(name, step, (num_heads,), "(H,)")
    else:
        check_number(name, step)
