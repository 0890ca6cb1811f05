"""Attention maps (the paper's Fig. 7): a row of the token-to-token matrix, without forming that matrix."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from cbsa_torch._core.checks import check_floating
from cbsa_torch._core.precision import compute_dtype, no_autocast, solve_dtype
from cbsa_torch.interpret.capture import LayerRecord
from cbsa_torch.nn import (
    CBSA,
    MHSA,
    MSSA,
    TSSA,
    AdaptedCBSA,
    AgentAttention,
    LinearAttention,
    LinearCBSA,
    TokenMixer,
)
from cbsa_torch.ops.definite import solve
from cbsa_torch.ops.masking import masked_softmax, real_tokens
from cbsa_torch.ops.tssa import tssa_memberships

_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


@torch.no_grad()
def token_attention(record: LayerRecord, token: int = 0) -> Tensor:
    """How much a token attends to every token after the prefix, per head: a row of the N x N matrix. O(N).

    Which matrix that is depends on the layer. With W = U_k^T Z of one head, rows w_n as tokens:

    - CBSA: A A^T (paper, section 4.1), the sum over representatives i of A[token, i] A[n, i]. Of a certified
      step B^T B, with all weights B of the tokens in the representatives; entries may be negative.
    - AgentAttention: the product of its two softmaxes, tokens over agents times agents over tokens. A row
      sums to 1.
    - AdaptedCBSA: the one or the other, as it broadcasts. As for CBSA, the contraction is left out.
    - LinearAttention: its weights phi(q) . phi(k), normalised. A row sums to 1.
    - MSSA, MHSA, timm's Attention: the softmax over tokens, of this query alone. A row sums to 1. Attention
      dropout is left out.
    - LinearCBSA: S = W (eps^2 I + W^T W)^-1 W^T, that is W F W^T / eps^2 with the filter
      F = f(W^T W) of Eq. 12. The operator is W F = W - S W: what a token loses is what S collects for it.
      S tends to the projection A A^T of the principal directions for small eps. Entries may be negative.
    - TSSA, ``form="channel"``: the same with only the diagonal of W^T W (Eq. 13): for small eps, A A^T of the
      basis directions.
    - TSSA, ``form="tost"``, compares no token with another. It assigns every token to the heads,
      Pi = softmax over heads, and what token n adds to the mean squares that scale ``token`` in head k is
      weighted by Pi_k[n] / sum_m Pi_k[m]. The map is Pi_k[token] Pi_k[n] / sum_m Pi_k[m]: that weight times
      how much the token belongs to the head. Its shape over n is the head's membership map, the same for
      every token; ``token`` sets its height.

    Learned numbers that a map needs (TSSA's temperature) are read from ``record.layer``.

    Args:
        record: a captured layer.
        token: index among all N tokens, prefix tokens first: 0 is the class token of a model that has one,
            else the first token. Negative indices count from the last token.

    Returns:
        ``(B, H, N - prefix tokens)`` in float32 or better; 0 at masked tokens, and everywhere if ``token`` is
        masked.

    Raises:
        ValueError: the layer is a mixer of your own. IndexError: no such token. TypeError: ``token`` is not an
            int.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import capture, token_attention
        >>> model = timm.create_model("crate_pico_patch1_8", depth=1).eval()
        >>> with capture(model) as records:
        ...     logits = model(torch.randn(2, 1, 8, 8))
        >>> token_attention(records["blocks.0.attn"], token=-1).shape
        torch.Size([2, 4, 64])
    """
    n = record.tokens.shape[2]
    if isinstance(token, bool) or not isinstance(token, int):
        raise TypeError(f"token must be an int, got {token!r} of type {type(token).__name__}")
    if not -n <= token < n:
        raise IndexError(f"token must be one of {n} tokens, -{n} to {n - 1}, got {token}")
    with no_autocast(record.tokens):
        row = _row(record, token % n)  # (B, H, N)
    if record.token_mask is not None:
        real = record.token_mask
        row = row.masked_fill(~(real & real[:, token, None])[:, None], 0.0)
    return row[..., record.num_prefix_tokens :]


def cls_attention_maps(record: LayerRecord, token: int = 0) -> Tensor:
    """:func:`token_attention` laid out on the grid of the tokens.

    Args:
        record, token: as there.

    Returns:
        ``(B, H, *grid_size)``.

    Raises:
        ValueError: the record has no grid. Also what :func:`token_attention` raises.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import capture, cls_attention_maps
        >>> model = timm.create_model("cbt_pico_patch1_8", depth=1).eval()
        >>> with capture(model) as records:
        ...     logits = model(torch.randn(2, 1, 8, 6))
        >>> cls_attention_maps(records["blocks.0.attn"]).shape
        torch.Size([2, 4, 8, 6])
    """
    grid = _grid(record)
    return token_attention(record, token).unflatten(-1, grid)


def receptive_fields(record: LayerRecord) -> Tensor:
    """Where each representative of CBSA, or agent of agent attention, looks: its softmax over the tokens.

    Of a certified step it is B, all weights of the tokens in the representatives, of either sign.

    Args:
        record: a captured CBSA or AgentAttention layer.

    Returns:
        ``(B, H, M, *grid_size)``: A^T of Eq. 5, or B, prefix tokens left out; 0 at masked tokens and for
        representatives that do not exist.

    Raises:
        ValueError: another layer, or a record without a grid.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import capture, receptive_fields
        >>> model = timm.create_model("cbt_pico_patch1_8", depth=1).eval()
        >>> with capture(model) as records:
        ...     logits = model(torch.randn(2, 1, 8, 8))
        >>> receptive_fields(records["blocks.0.attn"]).shape
        torch.Size([2, 4, 16, 8, 8])
    """
    grid = _grid(record)
    if record.stages is None and record.agents is None:
        kind = type(record.layer).__name__
        raise ValueError(f"record must be of CBSA or AgentAttention; {record.name} is {kind}")
    with torch.no_grad(), no_autocast(record.tokens):
        fields = _over_tokens(record)
    return fields[..., record.num_prefix_tokens :].unflatten(-1, grid)


def upsample_maps(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize maps by linear interpolation between the centres of their cells.

    Args:
        maps: ``(..., *grid)``, floating point, with a 1-, 2- or 3-D grid.
        size: the new grid; its length says how many of the last axes are the old one.

    Returns:
        ``(..., *size)``; the same values if ``size`` is the grid.

    Raises:
        ValueError: sizes that do not fit. TypeError: ``maps`` is not a floating-point tensor.

    Examples:
        >>> from cbsa_torch.interpret import upsample_maps
        >>> upsample_maps(torch.tensor([0.0, 4.0]), (4,))
        tensor([0., 1., 3., 4.])
    """
    check_floating("maps", maps)
    sides = tuple(size) if isinstance(size, (tuple, list)) else ()
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)
    if len(sides) not in _INTERPOLATION or not whole:
        raise ValueError(f"size must be 1 to 3 positive ints, got {size!r}")
    lead = maps.ndim - len(sides)
    if lead < 0 or 0 in maps.shape[lead:]:
        raise ValueError(
            f"maps must have shape (..., *grid) with {len(sides)} grid axes, got {tuple(maps.shape)}"
        )
    if 0 in maps.shape:
        return maps.new_zeros(*maps.shape[:lead], *sides)
    flat = maps.reshape(1, -1, *maps.shape[lead:])
    resized = F.interpolate(flat, size=sides, mode=_INTERPOLATION[len(sides)], align_corners=False)
    return resized.reshape(*maps.shape[:lead], *sides)


def _grid(record: LayerRecord) -> tuple[int, ...]:
    if record.grid_size is None:
        raise ValueError(f"{record.name} has no grid to lay a map out on; pass grid_size to the layer")
    return record.grid_size


def _row(record: LayerRecord, token: int) -> Tensor:
    """``(B, H, N)``, whatever it may hold at masked tokens."""
    layer = record.layer
    if record.stages is not None or (isinstance(layer, AdaptedCBSA) and layer.broadcast == "shared"):
        attention = _over_tokens(record)
        return torch.einsum("bhm,bhmn->bhn", attention[..., token], attention)
    if isinstance(layer, LinearAttention):
        return _feature_row(record, token, layer.temperature)
    if isinstance(layer, AgentAttention):
        return _agent_row(record, token)
    if isinstance(layer, LinearCBSA):
        return _filter_row(record, token, layer.eps, layer.average, diagonal=False)
    if isinstance(layer, TSSA):
        if layer.temperature is None:
            return _filter_row(record, token, layer.eps, layer.average, diagonal=True)
        membership, weights = tssa_memberships(record.tokens, layer.temperature, record.token_mask)
        return membership[..., token, None] * weights
    if isinstance(layer, (MSSA, MHSA)) or not isinstance(layer, TokenMixer):
        return _softmax_row(record, token)
    kinds = (CBSA, AdaptedCBSA, AgentAttention, LinearAttention, LinearCBSA, MHSA, MSSA, TSSA)
    known = ", ".join(kind.__name__ for kind in kinds)
    raise ValueError(
        f"record must be of {known} or timm's Attention to have a map; {record.name} is {type(layer).__name__}"
    )


def _softmax_row(record: LayerRecord, token: int) -> Tensor:
    dtype = compute_dtype(record.tokens.dtype)
    query = record.tokens[:, :, token].to(dtype)  # (B, H, P)
    keys = (record.tokens if record.keys is None else record.keys).to(dtype)
    scale = getattr(record.layer, "scale", None) or query.shape[-1] ** -0.5  # timm's layer has it
    logits = scale * torch.einsum("bhp,bhnp->bhn", query, keys)
    allowed = None if record.token_mask is None else record.token_mask[:, None]  # (B, 1, N)
    if record.attn_mask is not None:
        mask = torch.atleast_2d(record.attn_mask)
        mask = mask[..., token if mask.shape[-2] > 1 else 0, :]  # (..., N), to broadcast to (B, H, N)
        if mask.dtype == torch.bool:
            allowed = mask if allowed is None else allowed & mask
        else:
            logits = logits + mask.to(dtype)
    if record.is_causal:
        before = torch.arange(logits.shape[-1], device=logits.device) <= token
        allowed = before if allowed is None else allowed & before
    return masked_softmax(logits, allowed)


def _agent_row(record: LayerRecord, token: int) -> Tensor:
    agents, dtype = cast(Any, record.agents), compute_dtype(record.tokens.dtype)
    query, values = record.tokens[:, :, token].to(dtype), agents.values.to(dtype)
    logits = torch.einsum("bhp,bhmp->bhm", query, values) * query.shape[-1] ** -0.5
    weights = masked_softmax(logits, None if agents.mask is None else agents.mask[:, None])
    return torch.einsum("bhm,bhmn->bhn", weights, _over_tokens(record))


def _over_tokens(record: LayerRecord) -> Tensor:
    """The weights of tokens in representatives or agents, ``(B, H, M, N)``; 0 for those that do not exist."""
    weights = record.token_weights
    if weights is not None:
        return weights
    agents, dtype = cast(Any, record.agents), compute_dtype(record.tokens.dtype)
    keys = (record.tokens if record.keys is None else record.keys).to(dtype)
    real = None if record.token_mask is None else record.token_mask[:, None, None]
    weights = masked_softmax(agents.values.to(dtype) @ keys.mT * keys.shape[-1] ** -0.5, real)
    return weights if agents.mask is None else weights.masked_fill(~agents.mask[:, None, :, None], 0.0)


def _feature_row(record: LayerRecord, token: int, temperature: Tensor) -> Tensor:
    """The weights of linear attention, log sum exp over its features in place of their product."""
    dtype = compute_dtype(record.tokens.dtype)
    query, keys = record.tokens[:, :, token, None].to(dtype), cast(Tensor, record.keys).to(dtype)
    gain = temperature.detach().to(dtype)[:, None, None] * query.shape[-1] ** 0.25
    sums = gain * (query + keys)  # (B, H, N, P)
    real = None if record.token_mask is None else record.token_mask[:, None]
    return masked_softmax(torch.logsumexp(torch.cat([sums, -sums], -1), -1), real)


def _filter_row(record: LayerRecord, token: int, eps: float, average: bool, *, diagonal: bool) -> Tensor:
    """The row of W (eps^2 I + G)^-1 W^T, with G = W^T W or its diagonal, N eps^2 for eps^2 with ``average``."""
    tokens = record.tokens
    w, count = real_tokens(tokens, record.token_mask, solve_dtype(tokens))
    w = w / (eps * count**0.5 if average else eps)
    query = w[:, :, token, :, None]  # (B, H, P, 1)
    if diagonal:
        solved = query / (1 + w.square().sum(-2)[..., None])
    else:
        identity = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
        solved = solve(identity + w.mT @ w, query)
    return (w @ solved)[..., 0].to(compute_dtype(tokens.dtype))
