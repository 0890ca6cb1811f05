"""Where the parts of a model are that see images, and what tells their layers the grid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from torch import nn

from cbsa_torch.models.adapt.hugging_face import is_hugging_face
from cbsa_torch.models.adapt.multihead import is_multihead
from cbsa_torch.nn.embeddings import embedding_of

_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding", "distillation_token")
_MOBILE_BLOCKS = ("MobileVitBlock", "MobileViTLayer")
"""timm's and transformers' blocks that attend within a feature map."""


class Tower(NamedTuple):
    """A part of a model whose attention layers see the patches of one image."""

    module: nn.Module
    embedding: nn.Module
    """Makes the patches."""
    num_prefix_tokens: int
    cell: tuple[int, int] = (1, 1)
    """How many positions of the embedding's output make a token's cell: those are attended to in turn."""


def find_towers(model: nn.Module) -> list[Tower]:
    """The towers of a model, outer ones first."""
    return [tower for module in model.modules() for tower in _towers_at(module)]


def image_tower(module: nn.Module) -> Tower | None:
    """The tower that a model of transformers is, if its ``embeddings`` have a convolution for patches.

    Not of ViTMAE, which shuffles them, also where it masks none.
    """
    embeddings = module._modules.get("embeddings")
    if embeddings is None or not type(module).__module__.startswith("transformers."):
        return None
    if hasattr(embeddings, "random_masking"):
        return None
    inner = embeddings._modules.get("patch_embeddings")
    projection = (
        embeddings._modules.get("patch_embedding") if inner is None else getattr(inner, "projection", None)
    )
    if not isinstance(projection, nn.Module):
        return None
    registers = getattr(embeddings, "register_tokens", None)
    prefix = _class_tokens(embeddings) + (0 if registers is None else registers.shape[1])
    return Tower(module, projection, prefix)


def _towers_at(module: nn.Module) -> Iterator[Tower]:
    embedding = embedding_of(module)
    if embedding is not None and _tells_grid(module, embedding):
        yield Tower(module, embedding, getattr(module, "num_prefix_tokens", 0))
    tower = image_tower(module)
    if tower is not None and any(map(is_hugging_face, module.modules())):
        yield tower
    if type(module).__name__ in _MOBILE_BLOCKS:
        block = cast(Any, module)
        cell = getattr(block, "patch_size", None) or (block.patch_height, block.patch_width)
        yield Tower(module, block.conv_1x1, 0, tuple(cell))
    convolution = _patch_convolution(module)
    if convolution is not None and any(map(is_multihead, module.modules())):
        yield Tower(module, convolution, _class_tokens(module))


def _patch_convolution(module: nn.Module) -> nn.Module | None:
    """What makes patches for layers of ``nn.MultiheadAttention``; None if it is not clear.

    torchvision's ``conv_proj``, or the only convolution whose windows do not overlap: OpenCLIP's ``conv1``,
    DETR's ``input_proj`` (1 x 1).
    """
    if "conv_proj" in module._modules:
        return module._modules["conv_proj"]
    children = [c for c in module.children() if isinstance(c, nn.Conv2d) and c.kernel_size == c.stride]
    return children[0] if len(children) == 1 else None


def _class_tokens(module: nn.Module) -> int:
    return sum(isinstance(getattr(module, name, None), nn.Parameter) for name in _CLASS_TOKENS)


def _tells_grid(model: nn.Module, embedding: nn.Module) -> bool:
    """Whether all layers see its grid: not of several embeddings (CrossViT), nor an odd class token (PiT)."""
    counted = hasattr(model, "num_prefix_tokens") or not hasattr(model, "cls_token")
    return counted and not isinstance(embedding, nn.ModuleList)
