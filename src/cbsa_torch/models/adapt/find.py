"""Find the attention layers of a model, and say of each whether it can be adapted."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

from timm.layers import Attention
from timm.layers.attention import AttentionRope
from timm.models.eva import EvaAttention
from torch import nn
from torch.nn.utils import parametrize

from cbsa_torch._core.checks import nearest
from cbsa_torch._core.linear import call_changes, is_offloaded
from cbsa_torch.models.adapt.hugging_face import is_hugging_face, is_mobile
from cbsa_torch.models.adapt.multihead import is_multihead, why_not_multihead
from cbsa_torch.nn import TokenMixer
from cbsa_torch.nn.grids import GridFollower

STANDARD: tuple[type[nn.Module], ...] = (Attention,)
"""Softmax attention with one ``qkv`` layer for queries, keys and values, as our mixers have it."""
ROTARY: tuple[type[nn.Module], ...] = (AttentionRope, EvaAttention)
"""The same with rotary embeddings, projections of their own or odd biases: EVA, DINOv3, Perception Encoder."""
SOFTMAX = (*STANDARD, *ROTARY)
"""timm's softmax attention of all tokens with all."""

ADAPTABLE = (
    "the self-attention of timm's ViTs (Attention, AttentionRope, EvaAttention: ViT, DeiT, DeiT-3, DINOv2, "
    "DINOv3, EVA, CLIP, SigLIP, hybrids, MobileViT), nn.MultiheadAttention (torchvision's ViT, OpenCLIP, "
    "encoders of DETR) and transformers' ViT, DeiT, DINOv2, MobileViT, the vision towers of CLIP and SigLIP "
    "(5.0 or newer)"
)

LAYER_CHOICES = ("all", "latter_half")
Layers = str | Sequence[int]

_POOLS = re.compile(r"Attention(?:al)?Pool|AttnPool|MultiheadAttentionPoolingHead")
_ATTENTION = re.compile(r"Attn|Attention|ParallelScalingBlock")
_PROJECTIONS = ("qkv", "q_proj", "k_proj", "v_proj", "proj", "o_proj", "out_proj")
_REASONS = {
    "WindowAttention": "it attends within windows, with a bias by relative position",
    "ParallelScalingBlock": "one layer projects queries, keys, values and the MLP together",
    "DiffParallelScalingBlock": "one layer projects queries, keys, values and the MLP together",
    "DiffAttention": "it is the difference of two softmaxes",
}
_DECODES = "its block has another attention, to other tokens: a decoder, whose queries are no patches"


class AttentionLayer(NamedTuple):
    """An attention layer of a model."""

    name: str
    module: nn.Module
    incompatibility: str
    """Why it cannot be adapted; empty if it can."""
    is_pool: bool = False
    """Whether it pools tokens in a head: not one of the layers to choose from."""

    @property
    def decodes(self) -> bool:
        """Whether it is of a decoder."""
        return self.incompatibility == _DECODES


def find_attention(model: nn.Module) -> list[AttentionLayer]:
    """Every attention layer of ``model`` in order, those that cannot be adapted included."""
    found = list(_search(model, ""))
    beside = Counter(layer.name.rpartition(".")[0] for layer in found if is_multihead(layer.module))
    return [
        layer._replace(incompatibility=_DECODES)
        if is_multihead(layer.module) and beside[layer.name.rpartition(".")[0]] > 1
        else layer
        for layer in found
    ]


def _search(module: nn.Module, name: str) -> Iterator[AttentionLayer]:
    kind = type(module).__name__
    # The model itself may have attention in its name.
    if name and _is_known(module):
        yield AttentionLayer(name, module, incompatibility(module))
    elif name and is_multihead(module._modules.get("base_layer")):
        reason = (
            f"it is an adapter ({type(module).__module__}) that works on the weights inside it: merge it first"
        )
        yield AttentionLayer(name, module, reason)
    elif name and _POOLS.search(kind):
        reason = "attention pooling of a head has queries of its own"
        yield AttentionLayer(name, module, reason, is_pool=True)
    elif name and _ATTENTION.search(kind) and not any(map(_is_known, module.modules())):
        yield AttentionLayer(name, module, incompatibility(module))
    else:
        for child_name, child in module.named_children():
            yield from _search(child, f"{name}.{child_name}".lstrip("."))


def _is_known(module: nn.Module) -> bool:
    return isinstance(module, (*SOFTMAX, TokenMixer)) or is_hugging_face(module) or is_multihead(module)


def incompatibility(module: nn.Module) -> str:
    """Why an attention layer cannot be adapted; empty if it can."""
    kind = type(module).__name__
    if isinstance(module, TokenMixer):
        return f"it is {kind} of cbsa_torch already"
    if is_hugging_face(module):
        return _changed(module)
    if is_multihead(module):
        return why_not_multihead(module) or _changed(module)
    base = next((base for base in SOFTMAX if isinstance(module, base)), None)
    if base is None:
        biased = any("rel" in name and "pos" in name for name, _ in module.named_parameters())
        other = "its bias by relative position needs all pairs of tokens" if biased else ""
        return _REASONS.get(kind, other or f"{kind} is not the standard attention of ViTs")
    if type(module).forward is not base.forward:
        return f"it has a forward of its own, not that of {base.__name__}"
    if getattr(module, "gate", None) is not None:
        return "its output gate has no place in our mixers"
    return _changed(module)


def projections_of(module: nn.Module) -> dict[str, nn.Module]:
    """The projections of a known attention layer by name, that of the output last."""
    if is_mobile(module):
        parts = cast(Any, module)
        attention = parts.attention
        return {
            "query": attention.query,
            "key": attention.key,
            "value": attention.value,
            "dense": parts.output.dense,
        }
    found = {name: module._modules.get(name) for name in _PROJECTIONS}
    return {name: layer for name, layer in found.items() if layer is not None}


def heads_of(module: nn.Module) -> tuple[int, int]:
    """Number of heads of a known attention layer, and their dimension."""
    held = cast(Any, module).attention if is_mobile(module) else module
    number: Any = getattr(held, "num_heads", None) or held.num_attention_heads
    dim: Any = held.attention_head_size if is_mobile(module) else held.head_dim
    return number, dim


def _changed(module: nn.Module) -> str:
    """What was done to a layer after it was built that another could not keep, or nothing."""
    change = call_changes(module)
    if change and not _is_only_watched(module):
        return f"{change}, which would be lost; remove that first"
    if parametrize.is_parametrized(module):
        return "its parameters are parametrised, which would be lost; remove that first"
    for name, layer in projections_of(module).items():
        if not isinstance(getattr(layer, "in_features", None), int):
            return f"its {name} is {type(layer).__name__}, not a linear layer"
        if is_offloaded(layer):
            return f"the weights of its {name} are offloaded; adapt the model first"
    scale = getattr(module, "scale", getattr(module, "scaling", None))
    if isinstance(scale, float) and not math.isclose(scale, heads_of(module)[1] ** -0.5):
        return f"its logits are scaled by {scale:g}, not by head_dim^-1/2"
    return ""


def _is_only_watched(module: nn.Module) -> bool:
    """Whether a layer has only hooks that change nothing.

    Ours tell it grids, for ``attn_implementation="cbsa"``; those of transformers keep outputs, in backbones and
    once a model was called with ``output_hidden_states=True``.
    """
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    watch = all(
        isinstance(getattr(hook, "__self__", None), GridFollower)
        or getattr(hook, "__module__", "") == "transformers.utils.output_capturing"
        for hook in hooks
    )
    return (
        watch
        and "forward" not in vars(module)
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


def select_layers(names: Sequence[str], layers: Layers) -> set[str]:
    """The names of the layers that ``layers`` asks for.

    Raises:
        ValueError, TypeError: not ``"all"``, ``"latter_half"`` or distinct indices that exist.
    """
    count = len(names)
    if isinstance(layers, str):
        if layers not in LAYER_CHOICES:
            raise ValueError(
                f"layers must be 'all', 'latter_half' or a sequence of indices, got {layers!r}"
                f"{nearest(layers, LAYER_CHOICES)}"
            )
        return set(names if layers == "all" else names[count // 2 :])
    if not isinstance(layers, Sequence):
        raise TypeError(f"layers must be 'all', 'latter_half' or a sequence of indices, got {layers!r}")
    chosen: list[str] = []
    for index in layers:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"layers must hold ints, got {index!r} of type {type(index).__name__}")
        if not -count <= index < count:
            raise ValueError(
                f"layers must hold indices from {-count} to {count - 1}, for the model has {count} attention "
                f"layers; got {index}"
            )
        if names[index] in chosen:
            raise ValueError(f"layers must not name a layer twice, got {list(layers)}")
        chosen.append(names[index])
    if not chosen:
        raise ValueError("layers must not be empty")
    return set(chosen)
