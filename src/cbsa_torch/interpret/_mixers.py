"""Which modules of a model are attention layers, without a forward pass."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import nn

from cbsa_torch._core.checks import nearest
from cbsa_torch.nn.mixer import TokenMixer


def find_mixers(model: nn.Module) -> dict[str, nn.Module]:
    """Name to module of every token mixer of ours and every ``Attention`` of timm's ViT, in order.

    Raises:
        ValueError: there is none.
    """
    vit = sys.modules.get("timm.models.vision_transformer")  # no model of timm's without it
    kinds = (TokenMixer,) if vit is None else (TokenMixer, vit.Attention)
    found = {
        name.replace("_orig_mod.", ""): module  # torch.compile's
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    }
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention layer of cbsa_torch or of timm's ViT")
    return found


def choose_mixers(model: nn.Module, layers: Sequence[str | int] | None) -> dict[str, nn.Module]:
    """Those of :func:`find_mixers` that ``layers`` names, by name or index (None: all), in model order.

    Raises:
        ValueError: no such layer, or none named. IndexError: an index out of range. TypeError: ``layers`` is
            one string, or holds something else.
    """
    found = find_mixers(model)
    if layers is None:
        return found
    if isinstance(layers, (str, int)):
        raise TypeError(f"layers must be a sequence of names or indices, got {layers!r}")
    names, chosen = list(found), set()
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, (str, int)):
            raise TypeError(f"layers must hold names or indices, got {layer!r} of type {type(layer).__name__}")
        if isinstance(layer, int):
            if not -len(names) <= layer < len(names):
                raise IndexError(f"layers: index {layer} is out of range, there are {len(names)} layers")
            chosen.add(names[layer])
        elif layer in found:
            chosen.add(layer)
        else:
            raise ValueError(f"layers: no layer {layer!r}{nearest(layer, found)}; there are {', '.join(found)}")
    if not chosen:
        raise ValueError("layers must name at least one layer, got none")
    return {name: module for name, module in found.items() if name in chosen}
