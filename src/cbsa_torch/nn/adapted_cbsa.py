"""CBSA on the queries, keys and values of a pretrained ViT (paper, section 4.2: CBSA* and CBSA∨)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cbsa_torch import ops
from cbsa_torch._core.checks import check_choice, check_number, exact_eps
from cbsa_torch._core.precision import compute_dtype, no_autocast
from cbsa_torch._core.types import BROADCASTS, CONTRACTIONS, Broadcast, Contraction, Layout
from cbsa_torch.nn.agent_attention import AgentAttention
from cbsa_torch.nn.tokens import Heads
from cbsa_torch.ops import counting
from cbsa_torch.ops.cbsa.contraction import contract
from cbsa_torch.ops.masking import masked_softmax, zero_rows


class AdaptedCBSA(AgentAttention):
    """Agent attention with a contraction of what the agents collect: CBSA for inherited projections; O(N).

    Representatives begin as pooled queries and collect values, R = A^T V with A the softmax over tokens (5).
    Queries and values of a pretrained ViT live in different spaces, so R is not added to the queries, as
    :class:`cbsa_torch.CBSA` does within its one subspace. Then C = R + gamma (contract(R) - R), with the
    contraction of Eq. 8 or 7, and the tokens receive kappa B C. At the start kappa is 1 and gamma 0: with a
    fresh broadcast the layer starts as :class:`cbsa_torch.AgentAttention`, which is as close to softmax
    attention as it comes, and learns how much to contract.

    Args:
        dim: channels of input and output.
        num_heads: number of heads H.
        num_representatives: M, or the grid of representatives, see :class:`cbsa_torch.CBSA`. Default: 64.
        contraction: ``"softmax"`` (Eq. 8), ``"exact"`` (Eq. 7) or ``"none"``.
        contraction_step: gamma at the start: 0 is none; 1 is the contraction as the paper states it, which
            makes representatives alike where values are small. Not of ``"none"``.
        eps: epsilon of ``"exact"``. Default: 0.1.
        broadcast: ``"softmax"``, B = a fresh softmax of queries over the pooled queries, or ``"shared"``, B = A
            of the extraction times N / M: the entries of A sum to M over N tokens, so that without this factor
            a token's weights would sum to M / N and not to 1 on average, and less the larger the image.
        layout: ``"official"`` pools as the research code does, see :class:`cbsa_torch.CBSA`.
        **options: of every mixer, see :class:`cbsa_torch.nn.TokenMixer`; ``tied`` and ``orthogonal`` raise.

    Attributes:
        step_tokens: kappa, ``(H,)``. step_contraction: gamma, ``(H,)``, None without contraction. Both learned.

    Examples:
        >>> from cbsa_torch.nn import AdaptedCBSA
        >>> layer = AdaptedCBSA(384, num_heads=6, qkv_bias=True)
        >>> layer.step_tokens.tolist(), layer.step_contraction.tolist()
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    """

    shards = False

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_representatives: int | Sequence[int] | None = None,
        contraction: Contraction = "softmax",
        contraction_step: float = 0.0,
        eps: float | None = None,
        broadcast: Broadcast = "softmax",
        layout: Layout = "standard",
        **options: Any,
    ) -> None:
        check_choice("contraction", contraction, CONTRACTIONS)
        check_choice("broadcast", broadcast, BROADCASTS)
        check_number("contraction_step", contraction_step)
        if contraction == "none" and contraction_step:
            raise ValueError(
                f"contraction_step is of a contraction; contraction='none', got {contraction_step}"
            )
        eps = exact_eps(eps, contraction)
        super().__init__(
            dim, num_heads, num_representatives=num_representatives, qkv="separate", layout=layout, **options
        )
        self.contraction: Contraction = contraction
        self.contraction_step = contraction_step
        self.eps = eps
        self.broadcast: Broadcast = broadcast
        self.step_tokens = self._per_head()
        self.step_contraction = None if contraction == "none" else self._per_head()
        self._reset_steps()

    def _reset_steps(self) -> None:
        nn.init.ones_(self.step_tokens)
        if self.step_contraction is not None:
            nn.init.constant_(self.step_contraction, self.contraction_step)

    def mix(self, heads: Heads) -> Tensor:
        """Extract, contract, broadcast: ``(B, H, N, P)``."""
        agents = self.agents(heads)
        mix = self._mix_afresh if self.broadcast == "softmax" else self._mix_shared
        output = mix(heads, agents.values, agents.mask)
        return self.step_tokens.to(output.dtype)[:, None, None] * output

    def _mix_afresh(self, heads: Heads, initial: Tensor, mask: Tensor | None) -> Tensor:
        extracted = ops.softmax_attention(initial, heads.keys, heads.values, key_mask=heads.source.token_mask)
        contracted = self._contract(extracted, mask).to(initial.dtype)  # (B, H, M, P)
        return ops.softmax_attention(heads.queries, initial, contracted, key_mask=mask)

    def _mix_shared(self, heads: Heads, initial: Tensor, mask: Tensor | None) -> Tensor:
        dtype = compute_dtype(initial.dtype)
        with no_autocast(initial):
            attention = _attention(
                initial.to(dtype), heads.keys.to(dtype), heads.source.token_mask, mask, self.head_dim**-0.5
            )  # (B, H, M, N)
            contracted = self._contract(attention @ heads.values.to(dtype), mask)
            output = _balance(attention, heads.source.token_mask, mask) * (attention.mT @ contracted)
        return output.to(initial.dtype)

    def _contract(self, extracted: Tensor, mask: Tensor | None) -> Tensor:
        """C of the representatives ``(B, H, M, P)``, those that exist, in float32 or better."""
        extracted = zero_rows(extracted, mask).to(compute_dtype(extracted.dtype))
        if self.step_contraction is None:
            return extracted
        with no_autocast(extracted):
            contracted = contract(extracted, self.contraction, self.head_dim**-0.5, self.eps, mask)
        return torch.lerp(extracted, contracted, self.step_contraction.to(extracted.dtype)[:, None, None])

    def count_heads(self, heads: Heads) -> counting.Counts:
        """Count extraction, contraction and broadcast."""
        n, m = heads.queries.shape[2], self.agents(heads).values.shape[2]
        counts = counting.cbsa(
            n, m, num_heads=self.num_heads, head_dim=self.head_dim, contraction=self.contraction
        )
        if self.broadcast == "shared":
            return counts
        pairs = self.num_heads * n * m
        return counts + counting.Counts(2 * pairs * self.head_dim, 0, pairs)

    def extra_repr(self) -> str:
        """Show the options when the module is printed."""
        return f"{super().extra_repr()}, contraction={self.contraction!r}, broadcast={self.broadcast!r}"


def _attention(
    initial: Tensor, keys: Tensor, token_mask: Tensor | None, mask: Tensor | None, scale: float
) -> Tensor:
    """A^T of Eq. 5, ``(B, H, M, N)``; zero for tokens and representatives that do not exist."""
    real = None if token_mask is None else token_mask[:, None, None, :]
    return zero_rows(masked_softmax(scale * (initial @ keys.mT), real), mask)


def _balance(attention: Tensor, token_mask: Tensor | None, mask: Tensor | None) -> Tensor:
    """N / M, of those that exist: ``(B or 1, 1, 1, 1)``. Cells of coordinates may be empty without any mask."""

    def count(mask: Tensor | None, number: int) -> Tensor:
        return attention.new_full((1,), number) if mask is None else mask.sum(-1).to(attention.dtype)

    m, n = attention.shape[-2:]
    return (count(token_mask, n) / count(mask, m).clamp(min=1))[:, None, None, None]
