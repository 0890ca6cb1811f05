"""One block for feature maps: norm, attention, residual, in place of any layer that keeps the shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from cbsa_torch._core.checks import check_positive_int
from cbsa_torch.nn.cbsa import CBSA

_CHANNELS_PER_HEAD = 32


class CBSABlock(nn.Module):
    """x + CBSA(norm(x)) on feature maps ``(B, C, height, width)``, volumes or sequences, of any size.

    For convolutional networks: necks, heads, bottlenecks. Every position is a token, and sees all others
    through the representatives; cost and memory are linear in the number of positions. The grid is that of the
    input, so nothing is to be set up for a size.

    Args:
        channels: C, of input and output.
        num_heads: number of subspaces. Default: as many as leave each at least 32 channels, and divide C.
        num_representatives: a number, or cells along each axis, see :class:`cbsa_torch.CBSA`. Default: 64.
        norm_layer: constructor of the norm over the channels of each position, the last axis there:
            ``LayerNorm``, ``RMSNorm``.
        device, dtype: of the parameters.
        **options: of :class:`cbsa_torch.CBSA`.

    Shape:
        ``(B, C, L)``, ``(B, C, height, width)`` or ``(B, C, depth, height, width)``; the output's is the same.

    Examples:
        >>> from cbsa_torch import CBSABlock
        >>> CBSABlock(64)(torch.randn(2, 64, 20, 30)).shape
        torch.Size([2, 64, 20, 30])
    """

    def __init__(
        self,
        channels: int,
        num_heads: int | None = None,
        *,
        num_representatives: int | Sequence[int] | None = None,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_positive_int("channels", channels)
        if isinstance(norm_layer, type) and issubclass(norm_layer, _NormBase):
            # its channels are on the second axis, where as many positions would be taken for them
            raise ValueError(
                "norm_layer must norm the last axis, the channels of each position, as LayerNorm does; "
                f"got {norm_layer.__name__}"
            )
        if num_heads is None:
            most = max(channels // _CHANNELS_PER_HEAD, 1)
            num_heads = next(h for h in range(most, 0, -1) if channels % h == 0)
        if num_representatives is not None:
            options["num_representatives"] = num_representatives
        self.channels = channels
        self.norm = norm_layer(channels, device=device, dtype=dtype)
        self.attn = CBSA(channels, num_heads, num_prefix_tokens=0, device=device, dtype=dtype, **options)

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Transform a feature map.

        Args:
            x: ``(B, C, *grid)`` with a 1-, 2- or 3-D grid.
            token_mask: ``(B, *grid)`` bool, True = a real position. The others are ignored and stay as is.

        Raises:
            ValueError: another number of axes or channels, or a mask that does not fit.
        """
        if not 3 <= x.ndim <= 5 or x.shape[1] != self.channels:
            raise ValueError(
                f"x must be a feature map (B, {self.channels}, *grid) with a 1-, 2- or 3-D grid, got shape "
                f"{tuple(x.shape)}"
            )
        grid = tuple(x.shape[2:])
        tokens = self.norm(x.flatten(2).transpose(1, 2))  # (B, N, C)
        update = self.attn(tokens, grid, None if token_mask is None else token_mask.flatten(1))
        return x + update.transpose(1, 2).reshape(x.shape)
