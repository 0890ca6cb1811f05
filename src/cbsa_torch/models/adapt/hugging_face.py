"""Our mixers in place of the attention of transformers' ``ViTModel`` and ``Dinov2Model``.

Found by the names of the classes: transformers need not be installed.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from cbsa_torch.models.adapt.rotary import SeparateHeads
from cbsa_torch.nn import AdaptedCBSA, AgentAttention, LinearAttention, MixerInput, TokenMixer

CLASSES = ("ViTAttention", "Dinov2Attention", "Dinov2WithRegistersAttention")


def is_hugging_face(module: nn.Module) -> bool:
    """Whether it is an attention layer of transformers (5.0 or newer) that we know."""
    kind = type(module)
    ours = kind.__module__.startswith("transformers.") and kind.__name__ in CLASSES
    return ours and isinstance(getattr(module, "o_proj", None), nn.Module)


def hugging_face_towers(model: nn.Module) -> list[tuple[nn.Module, nn.Module, int]]:
    """The parts of the model that hold such layers, their patch embeddings, their numbers of prefix tokens."""
    found = []
    for module in model.modules():
        embeddings = module._modules.get("embeddings")
        projection = getattr(getattr(embeddings, "patch_embeddings", None), "projection", None)
        if isinstance(projection, nn.Module) and any(is_hugging_face(m) for m in module.modules()):
            found.append((module, projection, 1 + getattr(module.config, "num_register_tokens", 0)))
    return found


class _HFAttention(SeparateHeads):
    """Called as an attention layer of transformers; returns ``(output, None)``: it has no attention weights."""

    taken = ("q_proj", "k_proj", "v_proj", "o_proj")

    def inherit_projections(self, source: nn.Module) -> None:
        """Take over the layers of ``source``."""
        super().inherit_projections(source)
        del self._modules["proj"]

    @property
    def proj(self) -> nn.Linear:  # type: ignore[override]
        """The output projection, which has another name there."""
        return cast(nn.Linear, self._modules["o_proj"])

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:  # type: ignore[override]
        """Mix ``(B, N, C)`` tokens; a mask must be one of keys, the same for every query."""
        return self._forward(self.read(hidden_states, attention_mask)), None

    def read(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> MixerInput:  # type: ignore[override]
        """Read the arguments of :meth:`forward`."""
        return super().read(hidden_states, attn_mask=_of_keys(attention_mask))


def _of_keys(mask: Tensor | None) -> Tensor | None:
    """A mask as transformers makes them of ``(B, N)``, ``(B, 1, N, N)`` bool or 0 and lowest, as one of keys.

    Raises:
        ValueError: it differs from query to query, or weighs keys.
    """
    if mask is None or mask.ndim != 4:
        return mask
    keys = mask[:, :, :1]
    if not torch.equal(mask, keys.expand_as(mask)):
        raise ValueError("attention_mask must be the same for every query: there is no N x N matrix here")
    if keys.dtype == torch.bool:
        return keys
    if not ((keys == 0) | (keys <= -1e4)).all():
        raise ValueError("attention_mask must keep keys (0) or hide them (the lowest number), got others")
    return keys == 0


class HFAdaptedCBSA(_HFAttention, AdaptedCBSA):
    """:class:`cbsa_torch.nn.AdaptedCBSA` in a model of transformers."""


class HFAgentAttention(_HFAttention, AgentAttention):
    """:class:`cbsa_torch.AgentAttention` in a model of transformers."""


class HFLinearAttention(_HFAttention, LinearAttention):
    """:class:`cbsa_torch.nn.LinearAttention` in a model of transformers."""


HF_MIXERS: dict[type[TokenMixer], type[_HFAttention]] = {
    AdaptedCBSA: HFAdaptedCBSA,
    AgentAttention: HFAgentAttention,
    LinearAttention: HFLinearAttention,
}
