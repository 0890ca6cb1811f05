"""Stems: images to a grid of tokens, by small convolutions (paper, Appendix C) or linearly (CRATE)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from cbsa_torch._core.autodiff import is_per_sample
from cbsa_torch._core.checks import check_floating, check_positive_int
from cbsa_torch._core.fx import fx_leaf
from cbsa_torch._core.precision import compute_dtype
from cbsa_torch.nn.batch_norm import normalize_together
from cbsa_torch.nn.fused import FusedConv2d, check_fusable
from cbsa_torch.nn.scripted import ScriptedLinearStem


class _Level(NamedTuple):
    """Rows of images, or of what a layer makes of them."""

    needed: slice
    """Those that a rank computes."""
    own: slice
    """Those that no other rank owns."""


def _scaled(start: int, stop: int, factor: int, side: int) -> slice:
    return slice(min(start * factor, side), min(stop * factor, side))


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

    Examples:
        >>> from cbsa_torch.nn import ConvStem
        >>> ConvStem(3, embed_dim=64, patch_size=16)(torch.randn(1, 3, 224, 230)).shape
        torch.Size([1, 64, 14, 15])
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
        _check_sizes(in_chans=in_chans, embed_dim=embed_dim, patch_size=patch_size)
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

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        """Embed images."""
        check_images(x, self.in_chans)
        # Channels last is a quarter faster on the CPU. (Under vmap it cannot be asked for by memory_format.)
        if self.training and is_per_sample(x) and any(map(_writes_statistics, self.modules())):
            raise ValueError(
                "x is one sample under torch.func.vmap, and the batch norms of the convolutional stem mix, in "
                "training, all images of a batch: there is no gradient per sample. Use stem='linear', or put "
                "the stem into eval mode, where its statistics are constant"
            )
        return self.proj(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))

    def forward_list(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Embed batches of several sizes: each as :meth:`forward` would.

        But in training the batch norms see the pixels of all of them together, as those of one batch.
        """
        maps = []
        for x in batches:
            check_images(x, self.in_chans)
            maps.append(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))
        for layer in self.proj:
            if isinstance(layer, nn.Sequential) and layer[1].training:
                conv, norm = layer
                maps = _together(norm, [conv(x) for x in maps])
            else:
                maps = [layer(x) for x in maps]
        return maps

    def pixel_rows(self, rows: slice, height: int) -> slice:
        """The rows of images of ``height`` that the token rows ``rows`` are made of, halo included."""
        return self._levels(rows, height)[0].needed

    def embed_band(self, x: Tensor, rows: slice, height: int, group: dist.ProcessGroup) -> Tensor:
        """Some rows of what :meth:`forward` gives for whole images; the ranks of ``group`` have the others.

        Layers get a halo of one row of their output, which two ranks compute and batch norms count once.

        Args:
            x: ``(B, in_chans, h, width)``, the rows of :meth:`pixel_rows`.
            rows: of tokens, from start to stop.
            height: of the whole images.
            group: the ranks.
        """
        check_images(x, self.in_chans)
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        levels = self._levels(rows, height)
        layers: Any = self.proj
        for layer in layers:
            if isinstance(layer, nn.GELU):
                x = layer(x)
                continue
            (given, _), (needed, own), *_ = levels
            levels = levels[1:]
            parts: tuple[Any, Any] = (layer[0], layer[1]) if isinstance(layer, nn.Sequential) else (layer, None)
            conv, norm = parts
            together = isinstance(norm, _BatchNorm) and (norm.training or norm.running_mean is None)
            called = conv if together else layer
            if x.shape[2]:
                skip = needed.start - given.start // conv.stride[0]
                x = called(x)[:, :, skip : skip + needed.stop - needed.start]
            else:  # no rows, but gradients to take part in
                width = -(-x.shape[3] // conv.stride[1])
                parameters = sum((p.sum() for p in called.parameters()), x.sum())
                x = x.new_zeros(x.shape[0], conv.out_channels, 0, width) + parameters
            if together:
                counted = slice(own.start - needed.start, own.stop - needed.start)
                # of several processes already, if it has a group of its own: that of data parallel and these
                x = normalize_together(norm, x, getattr(norm, "process_group", group), counted)
        return x

    def _levels(self, rows: slice, height: int) -> list[_Level]:
        """The rows of the images and after each convolution that token rows need."""
        strides = [layer.stride[0] for layer in self.proj.modules() if isinstance(layer, nn.Conv2d)]
        heights = [height]
        for stride in strides:
            heights.append(-(-heights[-1] // stride))
        levels = [_Level(rows, rows)]
        for stride, side in zip(reversed(strides), reversed(heights[:-1]), strict=True):
            needed, own = levels[0]
            start, stop = needed.start, needed.stop
            if start < stop:  # a row more at each end; with stride 2 the last row needs none below
                start, stop = max(start - 1, 0), stop + (stride == 1)
            levels.insert(
                0, _Level(_scaled(start, stop, stride, side), _scaled(own.start, own.stop, stride, side))
            )
        return levels

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in place of the stem."""
        return self.proj

    def fuse(self) -> ConvStem:
        """The same stem for inference, batch norms merged into the convolutions; timm's convention.

        Raises:
            ValueError: a layer to be merged has hooks, its ``forward`` was replaced, or a norm keeps no
                statistics. TypeError: such a layer is of another class or quantised.
        """
        fused = copy.deepcopy(self)
        for i, layer in enumerate(fused.proj):
            if isinstance(layer, nn.Sequential):
                fused.proj[i] = _merge(layer)
        return fused


def _together(norm: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    """A batch norm of maps ``(B, C, height, width)`` of several sizes, all pixels in one column."""
    rows = [x.permute(0, 2, 3, 1) for x in maps]
    column = torch.cat([x.flatten(0, 2) for x in rows])[None, :, None]  # (1, pixels, 1, C)
    normed = norm(column.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)[0, :, 0]  # (pixels, C)
    parts = normed.split([x.shape[:3].numel() for x in rows])
    return [part.view(x.shape).permute(0, 3, 1, 2) for part, x in zip(parts, rows, strict=True)]


@torch.no_grad()
def _merge(pair: Any) -> FusedConv2d:
    """One convolution for a convolution and its batch norm, computed in float32 or better."""
    conv, norm = pair
    check_fusable(pair, nn.Sequential)
    check_fusable(conv, nn.Conv2d)
    check_fusable(norm, _norm_class(norm))
    if norm.running_mean is None:
        raise ValueError("ConvStem cannot be fused: a batch norm keeps no statistics (track_running_stats)")
    given = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    dtype = compute_dtype(conv.weight.dtype)
    wide: list[Any] = [None if tensor is None else tensor.to(dtype) for tensor in given]
    weight, bias, mean, variance, scale, shift = wide
    merged = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, scale, shift)
    return FusedConv2d(conv, *(t.to(conv.weight.dtype) for t in merged))


def _norm_class(norm: nn.Module) -> type[nn.Module]:
    """The class of batch norm that a layer should be: PyTorch's, its synchronised one or a frozen one."""
    if isinstance(norm, nn.SyncBatchNorm):
        return nn.SyncBatchNorm
    # torchvision's, which timm's ``freeze`` puts in; same statistics, scale and shift
    return type(norm) if type(norm).__name__ == "FrozenBatchNorm2d" else nn.BatchNorm2d


class LinearStem(nn.Module):
    """The patch embedding of the original CRATE: layer norm, a linear layer, layer norm on flat patches.

    Args:
        in_chans: image channels.
        embed_dim: channels of the tokens.
        patch_size: side of a patch; image sides must be multiples of it.
        device, dtype: of the parameters.

    Shape:
        ``(B, in_chans, height, width)`` -> ``(B, embed_dim, height / patch, width / patch)``.

    Examples:
        >>> from cbsa_torch.nn import LinearStem
        >>> LinearStem(3, embed_dim=64, patch_size=16)(torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 64, 14, 14])
    """

    def __init__(
        self,
        in_chans: int = 3,
        embed_dim: int = 576,
        patch_size: int = 16,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(in_chans=in_chans, embed_dim=embed_dim, patch_size=patch_size)
        self.in_chans = in_chans
        self.patch_size = patch_size
        patch_dim = in_chans * patch_size**2
        self.norm1 = nn.LayerNorm(patch_dim, device=device, dtype=dtype)
        self.proj = nn.Linear(patch_dim, embed_dim, device=device, dtype=dtype)
        self.norm2 = nn.LayerNorm(embed_dim, device=device, dtype=dtype)

    def grid_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The token grid of images of ``(height, width)`` pixels."""
        height, width = img_size
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"images must have sides that are multiples of patch_size {self.patch_size} for a linear "
                f"stem, got {height} x {width}; resize or pad them, or use the convolutional stem"
            )
        return height // self.patch_size, width // self.patch_size

    def pixel_rows(self, rows: slice, height: int) -> slice:
        """The rows of images of ``height`` that the token rows ``rows`` are made of."""
        return slice(rows.start * self.patch_size, rows.stop * self.patch_size)

    def embed_band(self, x: Tensor, rows: slice, height: int, group: dist.ProcessGroup) -> Tensor:
        """Some rows of what :meth:`forward` gives for whole images, see :meth:`ConvStem.embed_band`."""
        return self(x)

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        """Embed images."""
        check_images(x, self.in_chans)
        rows, columns = self.grid_size((x.shape[2], x.shape[3]))
        x = x.unflatten(3, (columns, self.patch_size)).unflatten(
            2, (rows, self.patch_size)
        )  # (B, C, h, p, w, p)
        x = x.permute(0, 2, 4, 3, 5, 1).flatten(3)  # (B, h, w, p * p * C), channels last within a patch
        return self.norm2(self.proj(self.norm1(x))).permute(0, 3, 1, 2)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in place of the stem."""
        return ScriptedLinearStem(self)

    def forward_list(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Embed batches of several sizes."""
        return [self(x) for x in batches]


def check_rows(stem: nn.Module) -> None:
    """Raise ValueError where a part of a stem was replaced by one that cannot be computed by rows with a halo.

    A group norm would see only the rows that are there, and a larger convolution needs more of them.
    """
    layers: Any = stem.proj if isinstance(stem, ConvStem) else ()
    for i, layer in enumerate(layers):
        conv, *others = layer if isinstance(layer, nn.Sequential) else [layer]
        norms = (_BatchNorm, nn.Identity)
        usual = isinstance(conv, nn.Conv2d) and (conv.kernel_size, conv.padding) == ((3, 3), (1, 1))
        known = all(isinstance(part, norms) or type(part) is _norm_class(part) for part in others)
        if not (isinstance(layer, nn.GELU) or (usual and known)):
            raise ValueError(
                "stem must have convolutions 3 x 3 with batch norms, and GELU, to be computed by rows; "
                f"proj.{i} is {layer}"
            )


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        check_positive_int(name, value)


def check_images(x: Tensor, in_chans: int) -> None:
    """Raise unless ``x`` is ``(B, in_chans, height, width)``."""
    check_floating("images", x)
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(
            f"images must have shape (B, {in_chans}, height, width), got {tuple(x.shape)}; "
            "in_chans sets the channels of the model"
        )


def _writes_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.training and module.running_mean is not None
