"""Patch embeddings of other packages' models: which part they are, and the grid that they made of an image."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

from cbsa_torch._core.tracing import is_open, pin_image_size
from cbsa_torch._core.types import GridSize

EMBEDDING = "patch_embed"
"""timm's name of the patch embedding."""


def is_embedding(name: str, module: nn.Module | None) -> bool:
    """Whether a part of this name is a patch embedding: timm's ``patch_embed``, or a NaFlexVit's ``embeds``."""
    return name == EMBEDDING or (name == "embeds" and type(module).__name__ == "NaFlexEmbeds")


def embedding_of(model: nn.Module) -> nn.Module | None:
    """The patch embedding of a model, None if it has none."""
    return next((part for name, part in model._modules.items() if is_embedding(name, part)), None)


def pin_images(embedding: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Hook before an embedding: traces of what the layers make of the grid hold for one size."""
    if not inputs:
        return inputs
    in_fx = (
        isinstance(inputs[0], Proxy) and type(embedding).__name__ != "NaFlexEmbeds"
    )  # which gets patches, too
    if in_fx or (isinstance(inputs[0], Tensor) and inputs[0].ndim == 4):
        return (pin_image_size(inputs[0]), *inputs[1:])
    return inputs


def grid_made_by(embedding: nn.Module, inputs: tuple[Any, ...], output: Any) -> GridSize | None:
    """The grid of an embedding's output; None if it does not tell."""
    if isinstance(output, (tuple, list)):  # timm's PatchEmbedWithSize and NaFlexEmbeds: tokens and their grid
        output, *told = output
        if told and isinstance(told[0], tuple):
            return _sides(told[0])
    if not isinstance(output, Tensor):
        return None
    if output.ndim == 4:
        channels_last = str(getattr(embedding, "output_fmt", "NCHW")).endswith("NHWC")
        height, width = output.shape[1:3] if channels_last else output.shape[2:]
        return _sides((height, width))
    measure: Callable[..., Any] | None = getattr(embedding, "dynamic_feat_size", None)
    if measure is None or not inputs or inputs[0].ndim != 4:
        grid = getattr(embedding, "grid_size", None)
    else:
        grid = measure(tuple(inputs[0].shape[2:]))
    return None if grid is None or math.prod(grid) != output.shape[1] else _sides(grid)


def _sides(grid: GridSize) -> GridSize:
    """Height and width as numbers, but for those that an export leaves open."""
    height, width = (side if is_open(side) else int(side) for side in grid)
    return height, width
