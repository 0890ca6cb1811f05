"""The convolutional stem: patches by a stack of small convolutions (paper, Appendix C)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cbsa_torch._core.checks import check_floating, check_positive_int


class ConvStem(nn.Module):
    """log2(patch_size) convolutions 3x3 of stride 2, each with batch norm, GELU between.

    Channels double up to ``embed_dim``; patch size 16 gives four convolutions, 8 three, 1 a single one of
    stride 1. Image sides need not be multiples of the patch size: the grid is their ratio rounded up.

    Args:
        in_chans: image channels.
        embed_dim: channels of the tokens, divisible by half the patch size.
        patch_size: a power of two.
        device, dtype: of the parameters.

    Shape:
        ``(B, in_chans, height, width)`` -> ``(B, embed_dim, ceil(height / patch), ceil(width / patch))``.
    """

    def __init__(
        self,
        in_chans: int = 3,
        embed_dim: int = 384,
        patch_size: int = 16,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_chans", in_chans), ("embed_dim", embed_dim), ("patch_size", patch_size)):
            check_positive_int(name, value)
        if patch_size & (patch_size - 1):
            raise ValueError(f"patch_size must be a power of two, got {patch_size}")
        count = max(patch_size.bit_length() - 1, 1)
        if embed_dim % 2 ** (count - 1):
            raise ValueError(
                f"embed_dim (={embed_dim}) must be divisible by {2 ** (count - 1)} for patch_size {patch_size}"
            )
        self.in_chans = in_chans
        self.patch_size = patch_size
        stride = 1 if patch_size == 1 else 2
        layers: list[nn.Module] = []
        channels = in_chans
        for i in range(count):
            width = embed_dim // 2 ** (count - 1 - i)
            conv = nn.Conv2d(channels, width, 3, stride, 1, bias=False, device=device, dtype=dtype)
            norm = nn.BatchNorm2d(width, device=device, dtype=dtype)
            layers += [nn.GELU()] if i else []
            layers += [nn.Sequential(conv, norm)]
            channels = width
        self.proj = nn.Sequential(*layers)

    def grid_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The token grid of images of ``(height, width)`` pixels."""
        height, width = img_size
        return -(-height // self.patch_size), -(-width // self.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Embed images."""
        check_floating("images", x)
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"images must have shape (B, {self.in_chans}, height, width), got {tuple(x.shape)}; "
                "in_chans sets the channels of the model"
            )
        return self.proj(x)
