"""Agent attention: softmax attention through a few agents, twice (Han et al., ECCV 2024)."""

from __future__ import annotations

from torch import Tensor

from cbsa_torch._core.checks import check_floating, check_mask, check_rows, check_shape
from cbsa_torch._core.precision import compute_dtype, no_autocast
from cbsa_torch.ops.cbsa.slices import StoredAttention
from cbsa_torch.ops.masking import check_attention, zero_rows
from cbsa_torch.ops.parallel import ContextParallel, merged
from cbsa_torch.ops.softmax_attention import softmax_attention


def agent_attention(
    queries: Tensor,
    agents: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    agent_mask: Tensor | None = None,
    parallel: ContextParallel | None = None,
) -> Tensor:
    """softmax(Q A^T) softmax(A K^T) V: agents collect values, and tokens collect from the agents. O(N).

    CBSA without contraction: the extraction (5) without its residual, and a broadcast by a fresh softmax of
    tokens over agents. Without the position biases and the depthwise convolution of the original, as in
    the paper's comparison.

    Args:
        queries: ``(B, H, N, P)``.
        agents: ``(B, H, M, P)``, e.g. pooled queries.
        keys: ``(B, H, K, P)``.
        values: ``(B, H, K, V)``.
        scale: factor on the logits. Default: P^-1/2.
        key_mask: ``(B, K)`` bool, True = a real key; an item without any gets zeros.
        agent_mask: ``(B, M)`` bool, True = an agent that exists for this item.
        parallel: who has the other tokens, if they are spread over processes: queries, keys, values and masks
            are then those of this rank, the agents the same on every rank. See :mod:`cbsa_torch.parallel`.

    Returns:
        ``(B, H, N, V)`` in the dtype of the inputs.

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: wrong dtypes.

    Examples:
        >>> from cbsa_torch.ops import agent_attention, pool_representatives
        >>> tokens = torch.randn(1, 4, 64, 16)
        >>> agents = pool_representatives(tokens, (8, 8), 16).values
        >>> agent_attention(tokens, agents, tokens, tokens).shape
        torch.Size([1, 4, 64, 16])
    """
    check_floating("queries", queries)
    length = None if parallel is None else parallel.length
    check_shape("queries", queries, (None, None, length, None), "(B, H, N, P)")
    b, h, _, p = queries.shape
    check_rows("agents", agents, (b, h, None, p), "(B, H, M, P)", "queries", queries)
    if agent_mask is not None:
        sizes = agents.shape[0], agents.shape[2]
        check_mask("agent_mask", agent_mask, sizes, "(B, M)", "a real agent", ("agents", agents))
        agents = zero_rows(agents, agent_mask)
    if parallel is not None:
        collected = _collect_from_ranks(queries, agents, keys, values, scale, key_mask, parallel)
        if not parallel.length:  # nobody to give it to, but a gradient to take part in
            return queries @ agents.mT @ collected
    else:
        collected = softmax_attention(agents, keys, values, scale=scale, key_mask=key_mask)  # (B, H, M, V)
    return softmax_attention(queries, agents, collected, scale=scale, key_mask=agent_mask)


def _collect_from_ranks(
    queries: Tensor,
    agents: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float | None,
    key_mask: Tensor | None,
    parallel: ContextParallel,
) -> Tensor:
    """What the agents collect from the values of all ranks, ``(B, H, M, V)``."""
    check_attention(agents, keys, values, key_mask, parallel)
    dtype = compute_dtype(queries.dtype)
    with no_autocast(queries):
        rows, keys, wide = (t.to(dtype) for t in (agents, keys, values))
        rows = rows * (queries.shape[-1] ** -0.5 if scale is None else scale)
        attention = StoredAttention(rows, zero_rows(keys, key_mask), zero_rows(wide, key_mask), key_mask)
        return merged(attention.lse, attention.picked, parallel)[1].to(values.dtype)
