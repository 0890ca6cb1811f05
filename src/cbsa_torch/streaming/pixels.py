"""Images that do not fit into memory: read by rows, normalised, and embedded by tiles of rows, exactly."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cbsa_torch._core.checks import check_choice
from cbsa_torch._core.linear import call_changes
from cbsa_torch._core.precision import compute_dtype
from cbsa_torch.models.resize import resize
from cbsa_torch.models.whitebox import WhiteBoxTransformer
from cbsa_torch.nn import ConvStem, LinearStem
from cbsa_torch.nn.stem import check_rows
from cbsa_torch.streaming.accepted import MARGIN
from cbsa_torch.streaming.arrays import SlicedArray, check_array, file_facts, read_part
from cbsa_torch.streaming.picture import draw_map

Channels = Literal["last", "first"]
SAMPLES, SAMPLE_WIDTH = 16, 64
"""Pieces of rows, and pixels in each, by which an image is known again."""


class Pixels:
    """Rows of an image, as a model is fed them.

    Args:
        array: the image.
        channels: whether they are its ``"last"`` axis or its ``"first"``; an array of two axes has one.
        in_chans: how many the model takes.
        mean, std: of each channel, subtracted and divided by; empty for 0 and 1. Integers are first divided by
            the largest of their dtype.

    Attributes:
        size: ``(height, width)``.
    """

    def __init__(
        self, array: SlicedArray, channels: Channels, in_chans: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        check_choice("channels", channels, ("last", "first"))
        kind = check_array("source", array)
        self.array, self.first = array, channels == "first"
        shape = tuple(int(side) for side in array.shape)
        flat = len(shape) == 2
        *sides, count = (*shape, 1) if flat else (*shape[1:], shape[0]) if self.first else shape
        if len(sides) != 2 or 0 in shape or count != in_chans:
            axes = "channels, height, width" if self.first else "height, width, channels"
            raise ValueError(
                f"source must have shape ({axes}) with the model's {in_chans} channels, or (height, width) for "
                f"one; got {shape}"
            )
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (0, in_chans):
                raise ValueError(
                    f"{name} must have one number for each of {in_chans} channels, got {len(values)}"
                )
            if not all(math.isfinite(value) and (name == "mean" or value > 0) for value in values):
                raise ValueError(f"{name} must be finite{' and positive' * (name == 'std')}, got {values}")
        self.size = (sides[0], sides[1])
        self.in_chans, self.flat = in_chans, flat
        self.largest = 1.0 if kind == "f" else float(np.iinfo(array.dtype).max)
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))

    def read(self, rows: slice, like: Tensor) -> Tensor:
        """``(1, in_chans, rows, width)`` in the dtype and on the device of ``like``."""
        part = self._read(rows, slice(0, self.size[1]))
        pixels = torch.from_numpy(part).to(like.device, compute_dtype(like.dtype))
        pixels = pixels if self.first or self.flat else pixels.permute(2, 0, 1)
        pixels = pixels.reshape(self.in_chans, *pixels.shape[-2:])
        if self.largest != 1:
            pixels = pixels / self.largest
        for numbers, scale in ((self.mean, False), (self.std, True)):
            if numbers:
                each = torch.tensor(numbers, dtype=pixels.dtype, device=pixels.device)[:, None, None]
                pixels = pixels / each if scale else pixels - each
        return pixels.to(like.dtype)[None]

    def _read(self, rows: slice, columns: slice) -> np.ndarray[Any, Any]:
        every = slice(0, self.in_chans)
        index: tuple[slice, ...] = (rows, columns)
        if not self.flat:
            index = (every, *index) if self.first else (*index, every)
        return read_part("source", self.array, index)

    def fingerprint(self) -> str:
        """By which the image is known again: shape, dtype, some of its pixels, size and time of its file."""
        height, width = self.size
        digest = hashlib.sha256(repr((tuple(self.array.shape), str(self.array.dtype), self.first)).encode())
        digest.update(repr((self.mean, self.std)).encode() + file_facts(self.array))
        for i in range(SAMPLES):
            row, column = i * (height - 1) // (SAMPLES - 1), i * max(width - SAMPLE_WIDTH, 0) // (SAMPLES - 1)
            part = self._read(slice(row, row + 1), slice(column, min(column + SAMPLE_WIDTH, width)))
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()


class PixelEmbedding:
    """What a white-box Transformer embeds, by rows of tokens: the stem with a halo, and positions.

    Args:
        model: whose stem and positions.
        pixels: the image.
        padded: its size with zeros at the bottom and on the right, as a segmenter pads it.

    Attributes:
        grid_size: of the tokens, the shape of results. place: the same, for mixers.

    Raises:
        ValueError: an image that the stem cannot embed, or a stem of another class or with hooks.
    """

    kind = "image"
    held = 0

    def __init__(self, model: WhiteBoxTransformer, pixels: Pixels, padded: tuple[int, int]) -> None:
        self.model, self.pixels, self.padded = model, pixels, padded
        stem = model.stem
        if type(stem) not in (ConvStem, LinearStem) or call_changes(stem):
            raise ValueError(f"stem must be ConvStem or LinearStem without hooks, got {type(stem).__name__}")
        check_rows(stem)
        if any(getattr(part, "running_mean", part) is None for part in stem.modules()):
            raise ValueError(
                "stem must have batch norms with running statistics: others take those of the whole image"
            )
        self.patch = stem.patch_size
        self.place = self.grid_size = stem.grid_size(padded)
        # An output row needs 2^k - 1 rows above its patch of 2^k, and none below; without a stride one of each.
        conv = isinstance(stem, ConvStem)
        self.above, self.below = int(conv), int(conv and self.patch == 1)
        self.along = None
        if self.grid_size != model.grid_size:
            self.along = [
                _resampling(own, side, model.pos_embed)
                for own, side in zip(model.grid_size, self.grid_size, strict=True)
            ]

    def tiles(self, budget: int, most: int) -> list[slice]:
        """The tokens of rows that are embedded at once; about ``most`` tokens: the halo costs, too."""
        height, width = self.grid_size
        # pixels; channels that double as sides halve
        numbers = 4 * self.pixels.in_chans * self.patch**2 + 3 * 15 * self.model.embed_dim
        row = int(MARGIN * width * numbers * compute_dtype(self.model.cls_token.dtype).itemsize)
        halo = self.above + self.below
        least = row * (1 + halo)
        if budget < least:
            raise ValueError(f"memory must be at least {least} bytes for a row of {width} tokens, got {budget}")
        rows = max(1, min(budget // row - halo, most // width, height))
        return [slice(tile.start * width, tile.stop * width) for tile in rows_of(height, rows)]

    def prefix(self) -> Tensor:
        """The class token with its position, ``(1, 1, C)``."""
        return self.model.pos_drop(
            self.model.cls_token + self.model.pos_embed[:, : self.model.num_prefix_tokens]
        )

    def tokens(self, place: slice) -> Tensor:
        """Those of whole rows, ``(1, rows * width, C)``, positions added."""
        rows = slice(place.start // self.grid_size[1], place.stop // self.grid_size[1])
        top, bottom = max(rows.start - self.above, 0), min(rows.stop + self.below, self.grid_size[0])
        height, width = self.pixels.size
        read = slice(top * self.patch, min(bottom * self.patch, height))
        image = self.pixels.read(read, self.model.pos_embed)
        if self.padded != (height, width):
            missing = min(bottom * self.patch, self.padded[0]) - read.stop
            image = torch.nn.functional.pad(image, (0, self.padded[1] - width, 0, missing))
        tokens = self.model.stem(image)[:, :, rows.start - top :][:, :, : rows.stop - rows.start]
        return self.model.pos_drop(tokens.flatten(2).transpose(1, 2) + self._positions(rows))

    def _positions(self, rows: slice) -> Tensor:
        first, width = self.model.num_prefix_tokens, self.grid_size[1]
        own = self.model.pos_embed
        if self.along is None:
            return own[:, first + rows.start * width : first + rows.stop * width]
        down, across = self.along
        grid = own[0, first:].unflatten(0, self.model.grid_size).to(down.dtype)  # (h, w, C)
        strips = torch.einsum("rh,hwc->rwc", down[rows], grid)
        return torch.einsum("sw,rwc->rsc", across, strips).flatten(0, 1)[None].to(own.dtype)

    def fingerprint(self) -> str:
        """By which the image is known again."""
        return self.pixels.fingerprint()

    def draw(self, array: Path, picture: Path) -> bool:
        """Draw a map."""
        draw_map(array, picture)
        return True


def _resampling(own: int, side: int, like: Tensor) -> Tensor:
    """``(side, own)`` the matrix that :func:`cbsa_torch.models.resize.resize` applies along one axis."""
    identity = torch.eye(own, dtype=compute_dtype(like.dtype), device=like.device)
    return resize(identity[None, None], (side, own), "bicubic")[0, 0]


def rows_of(height: int, rows: int) -> list[slice]:
    """``height`` rows in tiles of ``rows``, the last perhaps smaller."""
    return [slice(top, min(top + rows, height)) for top in range(0, height, rows)]


def padded_size(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """The next sides that are multiples of a patch."""
    height, width = (math.ceil(side / patch) * patch for side in size)
    return height, width
