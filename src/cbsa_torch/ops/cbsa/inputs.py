"""The operator's inputs, checked and completed once: what every implementation is given."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cbsa_torch._core.checks import (
    check_choice,
    check_device,
    check_floating,
    check_mask,
    check_number,
    check_per_head,
    check_positive,
    check_rows,
    check_shape,
)
from cbsa_torch._core.precision import compute_dtype
from cbsa_torch._core.types import (
    BROADCASTS,
    CONTRACTIONS,
    DEFAULT_EPS,
    Broadcast,
    Contraction,
    Representatives,
)
from cbsa_torch.ops.parallel import ContextParallel
from cbsa_torch.ops.token_weights import TokenWeights, check_slice, over_all_tokens


class CBSAInputs(NamedTuple):
    """Checked inputs of CBSA, defaults filled in. Made by :func:`cbsa_inputs`.

    Fields are those of the arguments of :func:`cbsa_torch.ops.cbsa`, if nothing else is said.

    Examples:
        >>> from cbsa_torch.ops import cbsa_inputs
        >>> inputs = cbsa_inputs(torch.randn(1, 2, 16, 8), torch.randn(1, 2, 4, 8), step_tokens=0.5)
        >>> inputs.step_tokens
        tensor([0.5000, 0.5000])
    """

    tokens: Tensor
    representatives: Tensor
    keys: Tensor
    """The tokens themselves, the same object, if none were given."""
    values: Tensor
    """The keys themselves, the same object, if none were given."""
    attention: Tensor | None
    """A^T if it was given: then nothing is extracted."""
    step_representatives: Tensor
    """``(H,)``."""
    step_tokens: Tensor
    """``(H,)``."""
    scale: float
    contraction: Contraction
    broadcast: Broadcast
    eps: float
    token_mask: Tensor | None
    key_mask: Tensor | None
    """``token_mask`` if none was given."""
    representative_mask: Tensor | None
    fraction: Tensor | None = None
    """``(H,)`` kappa of a certified step in parts of its limit, in place of ``step_tokens``; None: free."""
    token_weights: TokenWeights | None = None
    """Pi of a certified step: ``(1 or B, M, N)`` or a pooling; None without."""
    parallel: ContextParallel | None = None
    """Who has the other tokens, if this process does not have all."""
    relative: bool = False
    """Whether ``step_tokens`` is in units of tokens per representative, of every item."""


def cbsa_inputs(
    tokens: Tensor,
    representatives: Tensor,
    *,
    attention: Tensor | None = None,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    step_representatives: Tensor | float = 1.0,
    step_tokens: Tensor | float = 1.0,
    scale: float | None = None,
    contraction: Contraction = "softmax",
    broadcast: Broadcast = "shared",
    eps: float = DEFAULT_EPS,
    token_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    representative_mask: Tensor | None = None,
    parallel: ContextParallel | None = None,
) -> CBSAInputs:
    """Check the arguments of :func:`cbsa_torch.ops.cbsa` and fill in its defaults.

    Arguments are those of :func:`cbsa_torch.ops.cbsa`. With ``attention``, those of
    :func:`cbsa_torch.ops.contract_and_broadcast`: nothing is extracted.

    Raises:
        ValueError: shapes, options or devices that do not fit; options of the extraction beside ``attention``.
        TypeError: wrong dtypes.

    Examples:
        >>> from cbsa_torch.ops import cbsa_inputs
        >>> inputs = cbsa_inputs(torch.randn(1, 2, 16, 64), torch.randn(1, 2, 4, 64))
        >>> inputs.scale, inputs.contraction, inputs.keys is inputs.tokens
        (0.125, 'softmax', True)
    """
    check_choice("contraction", contraction, CONTRACTIONS)
    check_choice("broadcast", broadcast, BROADCASTS)
    check_positive("eps", eps)
    if attention is not None:
        fixed = keys is values is key_mask is None and broadcast == "shared"
        if not fixed or isinstance(step_representatives, Tensor) or step_representatives != 1.0:
            raise ValueError(
                "attention cannot be given beside keys, values, key_mask, step_representatives or "
                "broadcast='softmax': they are of the extraction that it replaces"
            )
    if scale is not None:
        check_number("scale", scale)
    check_floating("tokens", tokens)
    length = None if parallel is None else parallel.length
    check_shape("tokens", tokens, (None, None, length, None), "(B, H, N, P)")
    b, h, n, p = tokens.shape
    check_rows("representatives", representatives, (b, h, None, p), "(B, H, M, P)", "tokens", tokens)
    if keys is None:
        keys = tokens
    else:
        check_floating("keys", keys)
        if parallel is not None and keys.ndim == 4:
            length = keys.shape[2]  # any, also none
        check_rows("keys", keys, (b, h, length, p), "(B, H, K, P)", "tokens", tokens)
    if values is None:
        values = keys
    else:
        check_rows("values", values, (b, h, keys.shape[2], p), "(B, H, K, P)", "tokens", tokens)
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
        check_mask("token_mask", token_mask, (b, n), "(B, N)", "a real token", ("tokens", tokens))
    if key_mask is None:
        key_mask = token_mask
    else:
        check_mask("key_mask", key_mask, (b, keys.shape[2]), "(B, K)", "a real key", ("tokens", tokens))
    if representative_mask is not None:
        sizes = (b, representatives.shape[2])
        of = ("tokens", tokens)
        check_mask("representative_mask", representative_mask, sizes, "(B, M)", "a real representative", of)
    if attention is not None:
        m = representatives.shape[2]
        check_rows("attention", attention, (b, h, m, n), "(B, H, M, N)", "tokens", tokens)
    if parallel is not None and attention is not None:
        raise ValueError(
            "parallel cannot be given beside an attention: it was normalised over the tokens of one rank"
        )
    return CBSAInputs(
        tokens,
        representatives,
        keys,
        values,
        attention=attention,
        step_representatives=_per_head("step_representatives", step_representatives, tokens),
        step_tokens=_per_head("step_tokens", step_tokens, tokens),
        scale=p**-0.5 if scale is None else scale,
        contraction=contraction,
        broadcast=broadcast,
        eps=eps,
        token_mask=token_mask,
        key_mask=key_mask,
        representative_mask=representative_mask,
        parallel=parallel,
    )


def certified_inputs(
    tokens: Tensor,
    representatives: Representatives,
    *,
    fraction: Tensor | float,
    eps: float | None = None,
    step_representatives: Tensor | float = 1.0,
    scale: float | None = None,
    token_mask: Tensor | None = None,
    num_prefix_tokens: int = 0,
    parallel: ContextParallel | None = None,
) -> CBSAInputs:
    """Check the arguments of :func:`cbsa_torch.ops.certified_cbsa` and fill in its defaults.

    Raises:
        ValueError: shapes, options or devices that do not fit. TypeError: wrong dtypes.
    """
    if not isinstance(num_prefix_tokens, int) or isinstance(num_prefix_tokens, bool) or num_prefix_tokens < 0:
        raise ValueError(f"num_prefix_tokens must be an int of at least 0, got {num_prefix_tokens!r}")
    if not isinstance(fraction, Tensor):
        check_number("fraction", fraction)
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must be between 0 and 1, got {fraction!r}")
    values, mask, attention, token_weights = representatives
    check_floating("tokens", tokens)
    inputs = cbsa_inputs(
        tokens,
        values,
        attention=attention,
        step_representatives=step_representatives,
        scale=scale,
        contraction="exact",
        eps=tokens.shape[-1] ** 0.5 if eps is None else eps,
        token_mask=token_mask,
        representative_mask=mask,
        parallel=parallel,
    )
    if parallel is not None and token_weights is not None:
        if num_prefix_tokens:
            raise ValueError(
                "num_prefix_tokens must be 0 with parallel, where pool_representatives is told them and gives "
                f"weights of all of the rank's tokens; got {num_prefix_tokens}"
            )
        token_weights = check_slice(token_weights, tokens, values.shape[2])
    elif token_weights is not None:
        if attention is not None:
            raise ValueError("token_weights cannot be given beside an attention, which takes their place")
        token_weights = over_all_tokens(
            token_weights, tokens, values.shape[2], num_prefix_tokens, token_mask, mask
        )
    return inputs._replace(
        fraction=_per_head("fraction", fraction, tokens),
        token_weights=token_weights,
    )


def tokens_per_representative(inputs: CBSAInputs, real: Tensor | None = None) -> Tensor:
    """N / M of each item, of those that are real: ``(B, 1, 1, 1)``, float32 or better.

    Args:
        inputs: of the operator.
        real: ``(B,)`` how many tokens are real on all ranks, where they are spread and masked.
    """
    keys, parallel, exists = inputs.keys, inputs.parallel, inputs.representative_mask
    dtype = compute_dtype(keys.dtype)
    if real is None and inputs.token_mask is not None:
        real = inputs.token_mask.sum(-1)
    if real is None:
        length = keys.shape[2] if parallel is None else parallel.num_tokens
        real = length * keys.new_ones(keys.shape[0], dtype=dtype)  # an export may leave the length open
    number = inputs.representatives.shape[2] if exists is None else exists.sum(-1).to(dtype).clamp(min=1)
    return (real.to(dtype) / number)[:, None, None, None]


def check_projection(inputs: CBSAInputs, out_weight: Tensor, out_bias: Tensor | None) -> None:
    """Raise unless a projection out of the subspaces, ``(C, H * P)`` and ``(C,)``, fits the inputs."""
    _, h, _, p = inputs.tokens.shape
    _check_parameter("out_weight", out_weight, (None, h * p), "(C, H * P)", inputs.tokens)
    if out_bias is not None:
        _check_parameter("out_bias", out_bias, (out_weight.shape[0],), "(C,)", inputs.tokens)


def _check_parameter(
    name: str, parameter: Tensor, shape: tuple[int | None, ...], axes: str, tokens: Tensor
) -> None:
    check_floating(name, parameter)
    check_shape(name, parameter, shape, axes)
    check_device(name, parameter, "tokens", tokens)


def _per_head(name: str, step: Tensor | float, tokens: Tensor) -> Tensor:
    """A step size as ``(H,)``, a number in the dtype to compute in."""
    check_per_head(name, step, "tokens", tokens)
    if isinstance(step, Tensor):
        return step
    return tokens.new_full((tokens.shape[1],), step, dtype=compute_dtype(tokens.dtype))
