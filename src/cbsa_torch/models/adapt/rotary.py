"""Our mixers in place of timm's rotary attention: EVA, DINOv3, Perception Encoder."""

from __future__ import annotations

from cbsa_torch.models.adapt.separate import SeparateHeads
from cbsa_torch.nn import AdaptedCBSA, AgentAttention, LinearAttention, TokenMixer


class _RotaryHeads(SeparateHeads):
    """With rotary embeddings.

    Queries and keys are rotated before representatives are pooled from the queries: a representative has the
    mean rotation of its cell.
    """

    rotates = True


class RotaryAdaptedCBSA(_RotaryHeads, AdaptedCBSA):
    """:class:`cbsa_torch.nn.AdaptedCBSA` on the projections of timm's rotary attention."""


class RotaryAgentAttention(_RotaryHeads, AgentAttention):
    """:class:`cbsa_torch.AgentAttention` on the projections of timm's rotary attention."""


class RotaryLinearAttention(_RotaryHeads, LinearAttention):
    """:class:`cbsa_torch.nn.LinearAttention` on the projections of timm's rotary attention."""


ROTARY_MIXERS: dict[type[TokenMixer], type[_RotaryHeads]] = {
    AdaptedCBSA: RotaryAdaptedCBSA,
    AgentAttention: RotaryAgentAttention,
    LinearAttention: RotaryLinearAttention,
}
