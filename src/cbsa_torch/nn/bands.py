"""Images whose rows are spread over ranks: which rows a rank has, and their embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from cbsa_torch.nn.shares import ContextParallelInput
from cbsa_torch.nn.stem import check_images
from cbsa_torch.ops.parallel import ContextParallel


class ImageBand(NamedTuple):
    """Some rows of images, in place of whole images: those that this rank needs, see :func:`pixel_rows`.

    Examples:
        >>> import timm
        >>> import torch.distributed as dist
        >>> from cbsa_torch.parallel import ImageBand, context_parallel, pixel_rows
        >>> model = timm.create_model("cbt_nano_patch4_32").eval()
        >>> model = context_parallel(model, dist.group.WORLD)  # under torchrun
        >>> rows = pixel_rows(model, (64, 64))
        >>> model(ImageBand(torch.randn(1, 3, rows.stop - rows.start, 64), height=64)).shape
        torch.Size([1, 10])
    """

    pixels: Tensor
    """``(B, C, rows, width)``."""
    height: int
    """Of the whole images."""


def pixel_rows(model: Any, img_size: tuple[int, int]) -> slice:
    """The rows of images that this rank needs, with the halo of the stem; ``ImageBand`` is made of these.

    Args:
        model: what :func:`cbsa_torch.parallel.context_parallel` has prepared.
        img_size: height and width of the whole images in pixels.

    Raises:
        ValueError: a model that is not in context parallel.

    Examples:
        >>> import timm
        >>> import torch.distributed as dist
        >>> from cbsa_torch.parallel import context_parallel, pixel_rows
        >>> model = context_parallel(timm.create_model("cbt_nano_patch4_32"), dist.group.WORLD)
        >>> pixel_rows(model, (64, 64))  # one process has all rows
        slice(0, 64, None)
    """
    if getattr(model, "ranks", None) is None:
        raise ValueError("model must be in context parallel: call context_parallel(model, mesh) first")
    found: slice = model.stem.pixel_rows(_token_rows(model.stem, img_size, model.ranks.group), img_size[0])
    return found


def _token_rows(stem: Any, img_size: tuple[int, int], group: dist.ProcessGroup) -> slice:
    """About as many rows for each rank; none for some if there are fewer rows than ranks."""
    height, rank, size = stem.grid_size(img_size)[0], group.rank(), group.size()
    return slice(height * rank // size, height * (rank + 1) // size)


def embed_band(
    stem: Any,
    x: Tensor | ImageBand,
    group: dist.ProcessGroup,
    num_prefix_tokens: int,
    plan: ContextParallelInput,
    facts: Mapping[str, Any],
) -> tuple[Tensor, ContextParallel]:
    """Embed this rank's rows of images, after all ranks have agreed that they can.

    Args:
        stem: of the model.
        x: images, or the rows of this rank.
        group: the ranks.
        num_prefix_tokens: that the first rank has besides.
        plan: of the images.
        facts: what else must be the same on every rank.

    Returns:
        ``(B, D, rows, width)``, and who has which tokens if the first rank has the prefix tokens, too.

    Raises:
        ValueError: on every rank, where images do not fit or differ between ranks.
    """
    problem, length, grid, rows, height = "", 0, (1, 1), slice(0, 0), 1
    told: dict[str, Any] = {}
    pixels: Any = x.pixels if isinstance(x, ImageBand) else x
    try:
        if isinstance(pixels, (list, tuple)):
            raise TypeError(
                "images must be one batch (B, C, height, width), not a list of images: ranks share the rows of "
                "images of one size"
            )
        check_images(pixels, stem.in_chans)
        height = x.height if isinstance(x, ImageBand) else pixels.shape[2]
        size = (height, pixels.shape[3])
        grid, rows = stem.grid_size(size), _token_rows(stem, size, group)
        needed = stem.pixel_rows(rows, height)
        if not isinstance(x, ImageBand):
            pixels = plan.part("images", pixels, needed)
        elif pixels.shape[2] != needed.stop - needed.start:
            raise ValueError(
                f"pixels of the ImageBand must be the rows {needed.start} to {needed.stop} of the images, "
                f"got {pixels.shape[2]} rows"
            )
        length = (rows.stop - rows.start) * grid[1] + (num_prefix_tokens if group.rank() == 0 else 0)
        told = {"batch size": pixels.shape[0], "dtype": pixels.dtype, "image size": size}
    except (ValueError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    parallel = ContextParallel.of_slice(group, length, grid_size=grid, problem=problem, **told, **facts)
    return stem.embed_band(pixels, rows, height, group), parallel
