"""What a segmenter needs to know of an encoder: its stride, its channels, its map of patch features."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cbsa_torch._core.types import GridSize
from cbsa_torch.models.whitebox import WhiteBoxTransformer


def check_encoder(encoder: nn.Module) -> None:
    """Raise ``TypeError`` unless ``encoder`` offers feature maps as timm's models do."""
    if not hasattr(encoder, "forward_intermediates") and not hasattr(encoder, "forward_features"):
        raise TypeError(
            f"encoder must offer forward_intermediates or forward_features, as timm's models do; "
            f"{type(encoder).__name__} has neither"
        )
    if _last_info(encoder) is None and not hasattr(encoder, "patch_embed"):
        raise TypeError(
            f"encoder must tell its stride by feature_info or patch_embed; {type(encoder).__name__} has neither"
        )


def channels(encoder: nn.Module) -> int:
    """Channels of the features."""
    info = _last_info(encoder)
    return int(encoder.num_features if info is None else info["num_chs"])  # type: ignore[arg-type]


def strides(encoder: nn.Module) -> tuple[int, int]:
    """Pixels per feature, vertically and horizontally: the patch of a ViT."""
    info = _last_info(encoder)
    embed: Any = getattr(encoder, "patch_embed", None)
    ratio = embed.feat_ratio(as_scalar=False) if hasattr(embed, "feat_ratio") else None
    if ratio is not None and (info is None or max(ratio) == info["reduction"]):
        return int(ratio[0]), int(ratio[1])  # a patch need not be a square
    if info is None:
        raise TypeError(
            f"encoder must tell its stride by feature_info or patch_embed.feat_ratio; {type(encoder).__name__} "
            "has neither"
        )
    return int(info["reduction"]), int(info["reduction"])


def patch_features(encoder: nn.Module, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """Normalised features ``(B, C, h, w)`` of images whose sides are multiples of the strides.

    Class and register tokens are dropped. A list of images ``(C, height, width)`` of any sizes gives a list.

    Raises:
        ValueError: an encoder built for one size, and images of another; one whose own weights are offloaded.
    """
    if any(p.is_meta and not images[0].is_meta for p in encoder.parameters(recurse=False)):
        raise ValueError(
            "encoder is offloaded, and Accelerate loads its position embeddings for its forward alone, where a "
            'segmenter calls forward_intermediates: offload with preload_module_classes=["Segmenter"]'
        )
    if isinstance(images, Tensor):
        return _batch_features(encoder, images)
    if isinstance(encoder, WhiteBoxTransformer):  # one packed batch
        packed: list[Any] = encoder.forward_intermediates(
            images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return list(packed[-1])
    by_size: dict[torch.Size, list[int]] = defaultdict(list)
    for i, image in enumerate(images):
        by_size[image.shape].append(i)
    found: dict[int, Tensor] = {}
    for members in by_size.values():
        found |= zip(members, _batch_features(encoder, torch.stack([images[i] for i in members])), strict=True)
    return [found[i] for i in range(len(images))]


def _batch_features(encoder: nn.Module, images: Tensor) -> Tensor:
    size = (images.shape[2], images.shape[3])
    fixed = _fixed_size(encoder)
    if fixed not in (None, size):
        raise ValueError(
            f"the encoder was built for images of {fixed}, got {size} (padded to whole patches): build it with "
            "dynamic_img_size=True where it knows that, else with img_size"
        )
    if hasattr(encoder, "forward_intermediates"):
        found: Any = encoder.forward_intermediates(  # type: ignore[operator]
            images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return found[-1]
    x: Tensor = encoder.forward_features(images)  # type: ignore[operator]
    if x.ndim == 4:
        return x if x.shape[1] == channels(encoder) else x.permute(0, 3, 1, 2)
    vertical, horizontal = strides(encoder)
    grid: GridSize = (size[0] // vertical, size[1] // horizontal)
    x = x[:, x.shape[1] - grid[0] * grid[1] :]  # prefix tokens come first
    return x.transpose(1, 2).reshape(x.shape[0], -1, *grid)


def _last_info(encoder: nn.Module) -> dict[str, Any] | None:
    """What timm says of the last feature map."""
    info: Any = getattr(encoder, "feature_info", None)
    if hasattr(info, "get_dicts"):
        info = info.get_dicts()
    return info[-1] if isinstance(info, Sequence) and len(info) else None


def _fixed_size(encoder: nn.Module) -> tuple[int, int] | None:
    """The one size of a ViT that cannot resample its position embedding as it runs."""
    embed: Any = getattr(encoder, "patch_embed", None)
    size: Any = getattr(embed, "img_size", None) if getattr(embed, "strict_img_size", False) else None
    return None if size is None else (int(size[0]), int(size[1]))
