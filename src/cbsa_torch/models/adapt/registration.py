"""What transformers is told of us: attention by name, and how adapted models are loaded again."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from cbsa_torch._core.tracing import pin_sides, pin_size
from cbsa_torch._core.types import Broadcast, Contraction, GridSize
from cbsa_torch.models.adapt.hugging_face import METHOD, keys_of
from cbsa_torch.models.adapt.towers import image_tower
from cbsa_torch.models.adapt.vit import adapt_vit
from cbsa_torch.nn import AdaptedCBSA, AgentAttention, Heads, LinearAttention, MixerInput, TokenMixer
from cbsa_torch.nn.grids import GridFollower, lead_layers
from cbsa_torch.nn.tokens import as_token_mask, resolve_grid

ATTENTION: dict[str, type[TokenMixer]] = {
    "cbsa": AdaptedCBSA,
    "cbsa_agent": AgentAttention,
    "linear": LinearAttention,
}
_UNSUPPORTED = ("position_bias", "softcap", "s_aux", "sliding_window")
_PROJECTIONS = ("q_proj", "query")
_HOLD_TIMM = ("timm_model", "_backbone")
"""Where TimmWrapper and TimmBackbone keep a model of timm."""

_FOLLOWER = "_cbsa_grid_follower"
"""The attribute of an attention layer of transformers that tells its grid."""


def register_transformers(
    *,
    num_representatives: int | Sequence[int] | None = None,
    contraction: Contraction | None = None,
    eps: float | None = None,
    broadcast: Broadcast | None = None,
) -> None:
    """Make our attention known to transformers (5.0 or newer), for this process.

    Afterwards ``attn_implementation="cbsa"`` (CBSA*, with the contraction of the paper), ``"cbsa_agent"``
    (CBSA∨) and ``"linear"`` work for vision models whose attention is called through ``AttentionInterface``:
    ViT, DeiT, DINOv2, the vision towers of CLIP and SigLIP. They have no parameters of their own: weights stay
    those of the model, and steps are 1. Models that learn their steps are made by
    :func:`cbsa_torch.models.adapt_vit`; ``from_pretrained`` loads those again after this call, as
    ``save_pretrained`` wrote them.

    Representatives are pooled over the grid of patches. Models that are built after this call tell it, for
    every image; for others give it to the call, ``model(images, grid_size=(14, 14))``, where the model hands
    arguments on (SigLIP does not).

    Args:
        num_representatives, contraction, eps, broadcast: of ``"cbsa"``; the first of ``"cbsa_agent"``, too. As
            for :func:`cbsa_torch.models.adapt_vit`, whose defaults they have. A later call replaces them.

    Raises:
        ImportError: no transformers. ValueError, TypeError: options that do not fit.

    Examples:
        >>> from transformers import ViTConfig, ViTModel
        >>> from cbsa_torch.models.adapt import register_transformers
        >>> register_transformers(num_representatives=16)
        >>> sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> config = ViTConfig(**sizes, image_size=64, patch_size=8, attn_implementation="cbsa")
        >>> ViTModel(config).eval()(torch.randn(1, 3, 64, 64)).last_hidden_state.shape
        torch.Size([1, 65, 32])
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    shared = {} if num_representatives is None else {"num_representatives": num_representatives}
    given = {"contraction": contraction, "eps": eps, "broadcast": broadcast}
    options: dict[str, dict[str, Any]] = {
        "cbsa": shared | {name: value for name, value in given.items() if value is not None},
        "cbsa_agent": shared,
        "linear": {},
    }
    if contraction != "none":
        options["cbsa"]["contraction_step"] = 1.0
    for name, mixer in ATTENTION.items():
        mixer(8, 1, **options[name], device="meta")  # raises where options do not fit
    for name, mixer in ATTENTION.items():
        AttentionInterface.register(name, _attention_function(name, mixer, options[name]))
        AttentionMaskInterface.register(name, sdpa_mask)
    _register_once()


@functools.cache
def _register_once() -> None:
    register_module_module_registration_hook(_on_registration)
    _register_loading()


# --- attention by name


def _attention_function(name: str, mixer: type[TokenMixer], options: Mapping[str, Any]) -> Any:
    layers: dict[tuple[int, int, torch.device], TokenMixer] = {}

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        grid_size: GridSize | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Mix ``(B, H, N, P)`` into ``(B, N, H, P)``; no attention weights."""
        b, h, n, p = query.shape
        which = f"attn_implementation={name!r} of {type(module).__name__}"
        if is_causal or getattr(module, "is_causal", False):
            raise ValueError(
                f"{which}: it is causal, and every token gets a summary of all; set it for the vision tower "
                f'alone: attn_implementation={{"vision_config": {name!r}}}'
            )
        if key.shape != query.shape or value.shape != query.shape:
            raise ValueError(
                f"{which}: keys and values must be of the same tokens and heads as queries, got "
                f"{tuple(query.shape)} and {tuple(key.shape)} (cross-attention, a cache or grouped heads)"
            )
        if scaling is not None and not math.isclose(scaling, p**-0.5):
            raise ValueError(f"{which}: its logits are scaled by {scaling:g}, not by head_dim^-1/2")
        if dropout:
            raise ValueError(
                f"{which}: there are no weights to drop; set its attention dropout ({dropout}) to 0"
            )
        unknown = [option for option in _UNSUPPORTED if others.get(option) is not None]
        if unknown:
            raise ValueError(f"{which}: {unknown[0]} has no place here")
        device = query.device
        if (h, p, device) not in layers:
            layers[h, p, device] = _without_projections(mixer, h, p, options, device)
        layer = layers[h, p, device]
        x = query.transpose(1, 2).flatten(2)
        keys = keys_of(attention_mask)
        mask = None if keys is None else as_token_mask(keys, b, n)
        grid, prefix = None, 0
        if layer.needs_grid:
            follower: GridFollower | None = getattr(module, _FOLLOWER, None)
            known = None if follower is None else follower.source.num_prefix_tokens
            query = pin_sides(pin_size(query, (2,)), grid_size)
            place = _grid_of(follower, x, which) if grid_size is None else grid_size
            grid, prefix = resolve_grid(n, place, known)
        mixed = layer.mix(Heads(MixerInput(x, None, grid, prefix, mask), query, key, value))
        if mask is not None:
            mixed = mixed.masked_fill(~mask[:, None, :, None], 0.0)
        return mixed.transpose(1, 2).contiguous(), None

    return attention


@torch.compiler.disable  # compiled code calls it, the first time, and does not build it
def _without_projections(
    mixer: type[TokenMixer], num_heads: int, head_dim: int, options: Mapping[str, Any], device: torch.device
) -> TokenMixer:
    """A mixer that is never called, only asked to mix: its own steps are 1, and constant."""
    layer = mixer(num_heads * head_dim, num_heads, **options, device="meta").eval()
    for name in layer.step_names():
        setattr(layer, name, nn.Parameter(torch.ones(num_heads, device=device), requires_grad=False))
    return layer


def _grid_of(follower: GridFollower | None, x: Tensor, which: str) -> GridSize:
    if follower is None:
        raise ValueError(
            f"{which}: nothing tells the grid of its {x.shape[1]} tokens. Call register_transformers() before "
            "the model is built, or give grid_size=(height, width), in patches, to the model's call"
        )
    return follower.grid_of(x)


def _on_registration(module: nn.Module, name: str, child: nn.Module | None) -> None:
    """Hook of all modules: those of transformers that get ``embeddings`` may be towers of images."""
    if child is None or not type(module).__module__.startswith("transformers."):
        return
    _refuse_without_interface(module)
    if name == "embeddings":
        module.register_forward_pre_hook(_follow_images)
    elif name in _HOLD_TIMM:
        module.register_forward_pre_hook(_refuse_timm)


def _attention_of(model: nn.Module) -> str | None:
    """The name by which a model of transformers attends, if it is one of ours."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return name if name in ATTENTION else None


def _refuse_without_interface(model: Any) -> None:
    """Raise for a name of ours where it has no effect.

    transformers takes any registered name when a model is built, also of models whose layers compute softmax
    attention by themselves. (Once it is built, it keeps its attention, and transformers says so.)
    """
    name = _attention_of(model)
    if name and hasattr(model, "set_attn_implementation") and not model._can_set_attn_implementation():
        raise ValueError(
            f"attn_implementation={name!r} has no effect on {type(model).__name__}: its layers do not call "
            "AttentionInterface. Build it without, and see whether cbsa_torch.adapt_vit(model) takes it"
        )


def _refuse_timm(model: nn.Module, _: Any) -> None:
    """A model of timm does not ask transformers how to attend: a forward pre-hook."""
    name = _attention_of(model)
    if name:
        held = next(held for held in _HOLD_TIMM if held in model._modules)
        raise ValueError(
            f"attn_implementation={name!r} has no effect on {type(model).__name__}: layers of timm do not call "
            f"AttentionInterface. Use cbsa_torch.adapt_vit(model.{held}, inplace=True), or the architecture "
            "adapted_vit"
        )


def _follow_images(model: nn.Module, _: Any) -> None:
    """Let the attention of a tower that is ours by name follow the grids of its images: a forward pre-hook."""
    tower = image_tower(model) if _attention_of(model) else None
    if tower is None:
        return
    layers = {m for m in model.modules() if any(name in m._modules for name in _PROJECTIONS)}
    if all(hasattr(layer, _FOLLOWER) for layer in layers):
        return
    found = lead_layers(tower.module, tower.embedding, layers, tower.num_prefix_tokens)
    for layer, follower in found.items():
        setattr(layer, _FOLLOWER, follower)


# --- adapted models, loaded again


def _register_loading() -> None:
    """Have ``from_pretrained`` adapt a model before it reads its weights.

    transformers has one place where layers of a model are replaced before weights are loaded: its quantisers.
    This one quantises nothing.
    """
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(METHOD)
    class AdaptationConfig(QuantizationConfigMixin):
        """How a model was adapted: arguments of :func:`adapt_vit`, step by step."""

        def __init__(self, adapted: list[dict[str, Any]], quant_method: str = METHOD, **_: Any) -> None:
            self.quant_method = quant_method  # type: ignore[assignment]
            self.adapted = adapted

    @register_quantizer(METHOD)
    class Adapter(HfQuantizer):
        """Adapts a model that ``from_pretrained`` is about to load weights into."""

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
            configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
            records = {key: vars(config).pop("quantization_config", None) for key, config in configs.items()}
            for step in self.quantization_config.adapted:  # type: ignore[attr-defined]
                adapt_vit(model, step["mixer"], layers=step["layers"], inplace=True, **step["options"])
            for key, record in records.items():
                if record is not None:
                    configs[key].quantization_config = record
            return model

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            """To the rest of transformers it is no quantised model: it trains, and its dtype may be changed."""
            adapted = model.config.quantization_config
            self.remove_quantization_config(model)
            model.config.quantization_config = adapted
            for module in model.modules():
                if hasattr(module, "config"):
                    vars(module.config).pop("_is_quantized", None)
            return model

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True
