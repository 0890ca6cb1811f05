"""Agent attention as a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cbsa_torch import ops
from cbsa_torch._core.types import QKV, Layout, RepresentativeKind, Representatives, Strategy
from cbsa_torch.nn.mixer import TokenMixer
from cbsa_torch.nn.scripted import ScriptedAgents
from cbsa_torch.nn.tokens import Heads
from cbsa_torch.ops import counting


class AgentAttention(TokenMixer):
    """Agent attention (Han et al., ECCV 2024): softmax attention through a few pooled agents; O(N).

    CBSA without contraction, steps and residual, and with a fresh softmax to broadcast. Without position
    biases and depthwise convolution, as in the paper's comparison. Use it as ``x + AgentAttention(norm(x))``.

    Args:
        dim: channels of input and output.
        num_heads: number of heads H.
        num_representatives: how many agents, or the grid of them, as in :class:`cbsa_torch.CBSA`. Default: 64.
        representatives: where agents come from: ``"pool"``, ``"learned"`` or a strategy of your own as in
            :class:`cbsa_torch.CBSA`; not one that brings an attention with it.
        qkv: ``"separate"`` projections for queries, keys and values, as in the original, or one ``"shared"``
            projection, as the white-box layers have. Agents are made from the queries.
        layout: ``"official"`` pools as the research code's adapted ViTs do, see :class:`cbsa_torch.CBSA`.
        **options: of every mixer, see :class:`cbsa_torch.nn.TokenMixer`; ``tied`` and ``orthogonal`` need
            ``qkv="shared"``.

    Examples:
        >>> from cbsa_torch import AgentAttention
        >>> AgentAttention(384, num_heads=6, num_representatives=49)(torch.randn(2, 384, 14, 14)).shape
        torch.Size([2, 384, 14, 14])
    """

    shards = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_representatives: int | Sequence[int] | None = None,
        representatives: RepresentativeKind | Strategy = "pool",
        qkv: QKV = "separate",
        layout: Layout = "standard",
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, qkv=qkv, **options)
        self._make_representatives(representatives, num_representatives, layout)
        if getattr(self.representatives, "gives_attention", False):
            raise ValueError(
                "representatives must not bring an attention: agents attend to the tokens by softmax; "
                "use 'pool', 'learned' or a strategy of your own"
            )

    def mix(self, heads: Heads) -> Tensor:
        """Apply :func:`cbsa_torch.ops.agent_attention`."""
        agents = self.agents(heads)
        return ops.agent_attention(
            heads.queries,
            agents.values,
            heads.keys,
            heads.values,
            key_mask=heads.source.token_mask,
            agent_mask=agents.mask,
            parallel=heads.source.parallel,
        )

    def scripted_operator(self) -> nn.Module:
        """Both attentions."""
        return ScriptedAgents(self._scripted_representatives())

    def agents(self, heads: Heads) -> Representatives:
        """The agents that :meth:`mix` uses: values ``(B, H, M, P)`` and which of them exist."""
        agents = self._represent(heads)
        if agents.attention is not None:
            raise ValueError("representatives must not return an attention: agents attend by softmax")
        return agents

    def count_heads(self, heads: Heads) -> counting.Counts:
        """Count both softmax attentions."""
        agents = self.agents(heads)
        return counting.agent_attention(
            heads.queries.shape[2],
            agents.values.shape[2],
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            separate=not self.shared_qkv,
        )
