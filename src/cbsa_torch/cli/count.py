"""Counting models by name: what ``cbsa count`` prints, writes and draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch
import yaml
from timm.layers import Mlp
from torch import nn

from cbsa_torch._core.checks import nearest
from cbsa_torch.models import registry
from cbsa_torch.models.checkpoint import FETCHING_ARGS
from cbsa_torch.models.counting import LayerCounts, ModelCounts, count_model
from cbsa_torch.nn import CBSA, ISTA, MHSA, MSSA, TSSA, AgentAttention, LinearCBSA, TokenMixer
from cbsa_torch.train.errors import ConfigError

CURVE_TOKENS = tuple(2**k for k in range(4, 17))
"""Numbers of tokens that the plot samples."""


def count_named(name: str, args: Mapping[str, str], image_size: Sequence[int]) -> tuple[ModelCounts, list[int]]:
    """Build a model of timm without storage, and count it at an image size (none: the one it is made for)."""
    if not timm.is_model(name):
        suggestion = nearest(name, registry.names()) or nearest(name, timm.list_models())
        raise ConfigError(f"no model {name!r} in timm{suggestion}")
    if len(image_size) > 2 or any(side < 1 for side in image_size):
        raise ConfigError(f"--image-size must be one or two positive numbers, got {tuple(image_size)}")
    asked = (image_size[0], image_size[-1]) if image_size else None
    try:
        model = _build(name, args, asked)
        channels, *made_for = model.default_cfg["input_size"]
        height, width = asked or made_for
        size = (getattr(model, "in_chans", channels), height, width)
        with torch.device("meta"):
            return count_model(model, size), list(size)
    except Exception as error:  # constructors of any model of timm, called with anything
        raise ConfigError(f"cannot count {name}: {error}") from error


def _build(name: str, args: Mapping[str, str], img_size: tuple[int, int] | None = None) -> Any:
    """A model without storage, for images of a size where its constructor wants to know it."""
    refused = FETCHING_ARGS & args.keys()
    if refused:
        raise ConfigError(f"--args cannot be {', '.join(refused)}: counting needs no weights")
    model_args: dict[str, Any] = {key: yaml.safe_load(value) for key, value in args.items()}
    with torch.device("meta"):
        if img_size is None:
            return timm.create_model(name, **model_args)
        try:
            return timm.create_model(name, **model_args, img_size=img_size)
        except TypeError as error:
            if "unexpected keyword argument 'img_size'" not in str(error):
                raise
            return timm.create_model(name, **model_args)  # a convolutional network takes any size


def as_dict(name: str, size: list[int], counts: ModelCounts) -> dict[str, Any]:
    """Plain values, for JSON."""

    def row(layer: LayerCounts) -> dict[str, Any]:
        return {
            "name": layer.name,
            "kind": layer.kind,
            "parameters": layer.parameters,
            "flops": layer.counts.flops,
            "products": layer.counts.products,
            "factorizations": layer.counts.factorizations,
            "similarities": layer.counts.similarities,
        }

    return {
        "model": name,
        "input_size": size,
        "total": row(counts.total),
        "torch_flops": counts.torch_flops,
        "layers": [row(layer) for layer in counts.layers],
    }


def mixer_sizes(name: str, args: Mapping[str, str]) -> dict[str, int]:
    """Width and heads of a model's first token mixer."""
    model: nn.Module = _build(name, args)
    mixer = next((module for module in model.modules() if isinstance(module, TokenMixer)), None)
    if mixer is None:
        raise ConfigError(
            f"--plot takes its width and heads from the first model, and {name} has no mixer of ours"
        )
    return {"dim": mixer.dim, "num_heads": mixer.num_heads, "head_dim": mixer.head_dim}


MECHANISMS: dict[str, Callable[..., nn.Module]] = {
    "cbsa": CBSA,
    "mssa": MSSA,
    "mhsa": MHSA,
    "linear_cbsa": LinearCBSA,
    "tssa": TSSA,
    "agent": partial(AgentAttention, qkv="shared"),
    "mlp": lambda dim, num_heads, head_dim: Mlp(dim, 4 * dim),
    "ista": lambda dim, num_heads, head_dim: ISTA(dim),
}
"""Layers that the plot compares, projections included: mixers, and the two kinds of feed-forward."""


def flops_curves(dim: int, num_heads: int, head_dim: int) -> dict[str, list[int]]:
    """FLOPs of one layer of each mechanism at every number of :data:`CURVE_TOKENS`."""
    curves: dict[str, list[int]] = {}
    with torch.device("meta"):
        for name, build in MECHANISMS.items():
            layer = build(dim, num_heads, head_dim=head_dim)
            # Mixers take a map, channels first; feed-forwards read the last axis.
            mixes = isinstance(layer, TokenMixer)
            sizes = [(dim, 1, n) if mixes else (1, n, dim) for n in CURVE_TOKENS]
            model = nn.Sequential(layer)  # a layer counts as part of a model
            curves[name] = [count_model(model, size).total.counts.flops for size in sizes]
    return curves
