"""Images of any sizes as one row of tokens, without padding: what a model makes of a list of them."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from cbsa_torch._core.types import GridSize
from cbsa_torch.nn.packing import Packing

T = TypeVar("T")
Embed = Callable[[list[Tensor]], list[tuple[Tensor, GridSize]]]
"""Batches ``(b, C, height, width)`` of several sizes to their tokens ``(b, N, D)`` and grids."""


class PackedImages:
    """The tokens of images in one row, those of equal images beside each other.

    Args:
        images: ``(C, height, width)`` each.
        embed: embeds batches of images of equal sizes.

    Attributes:
        row: ``(1, T, D)``. packing: where the images are in it, for all layers. grids: of the images, in the
            order in which they were given.

    Raises:
        ValueError: no images, or some that are not ``(C, height, width)``.
    """

    def __init__(self, images: Sequence[Tensor], embed: Embed, num_prefix_tokens: int) -> None:
        if not images:
            raise ValueError("images must not be an empty list")
        self._num_prefix_tokens = num_prefix_tokens
        by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, image in enumerate(images):
            if not isinstance(image, Tensor) or image.ndim != 3:
                got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
                raise ValueError(f"each of a list of images must be a tensor (C, height, width), got {got}")
            by_size[tuple(image.shape)].append(i)
        alike = list(by_size.values())
        embedded = embed([torch.stack([images[i] for i in members]) for members in alike])
        self._order = list(itertools.chain(*alike))
        """Which image is where in the row."""
        in_row = [grid for members, (_, grid) in zip(alike, embedded, strict=True) for _ in members]
        self.grids = self._restored(in_row)
        lengths = [x.shape[1] for members, (x, _) in zip(alike, embedded, strict=True) for _ in members]
        self._ends = list(itertools.accumulate(lengths))
        self.row = torch.cat([x.flatten(0, 1) for x, _ in embedded])[None]
        ends = torch.tensor([0, *self._ends], dtype=torch.int32, device=self.row.device)
        self.packing = Packing(ends, grid_sizes=in_row, num_prefix_tokens=num_prefix_tokens)

    def split(self, row: Tensor) -> list[Tensor]:
        """The tokens ``(N, D)`` of each image, in the order given, from a row ``(1, T, D)``."""
        return self._restored(list(row[0].tensor_split(self._ends[:-1])))

    def split_maps(self, row: Tensor, output_fmt: str) -> tuple[list[Tensor], list[Tensor]]:
        """The patches of each image and its prefix tokens, as :func:`split_map` gives those of a batch."""
        pairs = [
            split_map(x[None], self._num_prefix_tokens, grid, output_fmt)
            for x, grid in zip(self.split(row), self.grids, strict=True)
        ]
        return [patches[0] for patches, _ in pairs], [prefix[0] for _, prefix in pairs]

    def _restored(self, in_row: list[T]) -> list[T]:
        return [item for _, item in sorted(zip(self._order, in_row, strict=True), key=lambda pair: pair[0])]


def split_map(x: Tensor, num_prefix_tokens: int, grid_size: GridSize, output_fmt: str) -> tuple[Tensor, Tensor]:
    """Patches ``(B, D, h, w)`` ("NCHW") or ``(B, h * w, D)`` ("NLC") of tokens, and their prefix tokens."""
    prefix, patches = x[:, :num_prefix_tokens], x[:, num_prefix_tokens:]
    if output_fmt == "NCHW":
        patches = patches.unflatten(1, grid_size).permute(0, 3, 1, 2).contiguous()
    return patches, prefix
