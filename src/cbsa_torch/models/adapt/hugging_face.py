"""Our mixers in place of attention of transformers: ViT, DeiT, DINOv2, CLIP and SigLIP towers, MobileViT.

Found by the names of the classes: transformers need not be installed.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from cbsa_torch._core.autodiff import check_values
from cbsa_torch._core.types import GridSize
from cbsa_torch.models.adapt.separate import SeparateHeads
from cbsa_torch.nn import AdaptedCBSA, AgentAttention, LinearAttention, MixerInput, TokenMixer

CLASSES = (
    "ViTAttention", "DeiTAttention", "Dinov2Attention", "Dinov2WithRegistersAttention",
    "CLIPAttention", "SiglipAttention", "MobileViTAttention",
)  # fmt: skip
METHOD = "cbsa_torch"
"""Under which transformers finds how to load adapted models, see :func:`register_transformers`."""
_OUT = ("o_proj", "out_proj")


def is_hugging_face(module: nn.Module) -> bool:
    """Whether it is an attention layer of transformers (5.0 or newer) that we know."""
    kind = type(module)
    if not kind.__module__.startswith("transformers.") or kind.__name__ not in CLASSES:
        return False
    return is_mobile(module) or any(isinstance(getattr(module, name, None), nn.Module) for name in _OUT)


def is_mobile(module: nn.Module) -> bool:
    """Whether it is the attention of transformers' MobileViT, whose projections are two levels down."""
    return type(module).__name__ == "MobileViTAttention"


class _HFAttention(SeparateHeads):
    """Called as an attention layer of transformers; returns ``(output, None)``: it has no attention weights."""

    taken = ("q_proj", "k_proj", "v_proj", *_OUT)

    def inherit_projections(self, source: nn.Module) -> None:
        """Take over the layers of ``source``."""
        super().inherit_projections(source)
        del self._modules["proj"]

    @property
    def proj(self) -> nn.Linear:  # type: ignore[override]
        """The output projection, which has another name there."""
        return cast(nn.Linear, next(self._modules[name] for name in _OUT if name in self._modules))

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        grid_size: GridSize | None = None,
        is_causal: bool = False,
        **_: Any,
    ) -> Any:
        """Mix ``(B, N, C)`` tokens; a mask must be one of keys, the same for every query."""
        return self._forward(self.read(hidden_states, attention_mask, grid_size, is_causal)), None

    def read(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        grid_size: GridSize | None = None,
        is_causal: bool = False,
        **_: Any,
    ) -> MixerInput:
        """Read the arguments of :meth:`forward`."""
        mask = keys_of(attention_mask)
        return super().read(hidden_states, grid_size, attn_mask=mask, is_causal=is_causal)


def keys_of(mask: Tensor | None) -> Tensor | None:
    """A mask as transformers makes them of ``(B, N)``, ``(B, 1, N, N)`` bool or 0 and lowest, as one of keys.

    Raises:
        ValueError: it differs from query to query, or weighs keys.
    """
    if mask is None or mask.ndim != 4:
        return mask
    keys = mask[:, :, :1]
    check_values(
        (mask == keys).all(), "attention_mask must be the same for every query: there is no N x N matrix here"
    )
    if keys.dtype == torch.bool:
        return keys
    hidden = keys <= -1e4
    check_values(
        ((keys == 0) | hidden).all(),
        "attention_mask must keep keys (0) or hide them (the lowest number), got others",
    )
    return ~hidden


class HFAdaptedCBSA(_HFAttention, AdaptedCBSA):
    """:class:`cbsa_torch.nn.AdaptedCBSA` in a model of transformers."""


class HFAgentAttention(_HFAttention, AgentAttention):
    """:class:`cbsa_torch.AgentAttention` in a model of transformers."""


class HFLinearAttention(_HFAttention, LinearAttention):
    """:class:`cbsa_torch.nn.LinearAttention` in a model of transformers."""


HF_MIXERS: dict[type[TokenMixer], type[SeparateHeads]] = {
    AdaptedCBSA: HFAdaptedCBSA,
    AgentAttention: HFAgentAttention,
    LinearAttention: HFLinearAttention,
}


class _MobileAttention(SeparateHeads):
    """Called as attention of transformers' MobileViT, with its layers ``attention.query``, ``output.dense``."""

    taken = ("attention", "output")

    def inherit_projections(self, source: nn.Module) -> None:
        """Take over the layers of ``source``."""
        super().inherit_projections(source)
        del self._modules["proj"]
        self.proj_drop = cast(nn.Dropout, cast(Any, source).output.dropout)

    @property
    def proj(self) -> nn.Linear:  # type: ignore[override]
        """The output projection."""
        return cast(nn.Linear, cast(Any, self).output.dense)

    def _separate_projections(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        attention = cast(Any, self).attention
        return attention.query, attention.key, attention.value


class MobileAdaptedCBSA(_MobileAttention, AdaptedCBSA):
    """:class:`cbsa_torch.nn.AdaptedCBSA` in transformers' MobileViT."""


class MobileAgentAttention(_MobileAttention, AgentAttention):
    """:class:`cbsa_torch.AgentAttention` in transformers' MobileViT."""


class MobileLinearAttention(_MobileAttention, LinearAttention):
    """:class:`cbsa_torch.nn.LinearAttention` in transformers' MobileViT."""


MOBILE_MIXERS: dict[type[TokenMixer], type[SeparateHeads]] = {
    AdaptedCBSA: MobileAdaptedCBSA,
    AgentAttention: MobileAgentAttention,
    LinearAttention: MobileLinearAttention,
}


def record_adaptation(
    model: nn.Module,
    mixer: str,
    options: Mapping[str, Any],
    layers: str | Sequence[int],
    countable: Sequence[str],
    adapted: Collection[str],
) -> None:
    """Write into the configurations of transformers how their models were adapted, to be saved with them.

    The vision tower of a CLIP has a configuration of its own, with which it may be saved or loaded alone.

    Args:
        model: adapted already.
        mixer, options, layers: of :func:`cbsa_torch.models.adapt_vit`.
        countable: the names of the layers that indices are of. adapted: those that are new.
    """
    recorded: set[int] = set()
    for name, part in model.named_modules():
        if not any(base.__module__ == "transformers.modeling_utils" for base in type(part).__mro__):
            continue
        config: Any = part.config
        inside = [key for key in countable if not name or key.startswith(f"{name}.")]
        indices = [i for i, key in enumerate(inside) if key in adapted]
        if id(config) in recorded or not indices:
            continue
        recorded.add(id(config))
        asked = indices if part is not model else layers if isinstance(layers, str) else list(layers)
        step = {"mixer": mixer, "layers": asked, "options": {k: _plain(v) for k, v in options.items()}}
        earlier = getattr(config, "quantization_config", None)
        known = {} if earlier is None else earlier if isinstance(earlier, dict) else earlier.to_dict()
        if known and known.get("quant_method") != METHOD:
            warnings.warn(
                "save_pretrained will not keep the new layers: it is quantised by "
                f"{known.get('quant_method')}; adapt it before, or keep its state dict",
                stacklevel=3,
            )
        else:
            config.quantization_config = {"quant_method": METHOD, "adapted": [*known.get("adapted", []), step]}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
