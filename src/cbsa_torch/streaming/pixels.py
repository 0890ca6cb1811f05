"""Images that do not fit into memory: read by rows, normalised, and embedded by tiles of rows, exactly."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from cbsa_torch._core.checks import check_choice
from cbsa_torch._core.linear import call_changes
from cbsa_torch._core.precision import compute_dtype
from cbsa_torch.models.resize import resize
from cbsa_torch.models.whitebox import WhiteBoxTransformer
from cbsa_torch.nn import ConvStem, LinearStem

Channels = Literal["last", "first"]
SAMPLES, SAMPLE_WIDTH = 16, 64
"""Pieces of rows, and pixels in each, by which an image is known again."""


class SlicedArray(Protocol):
    """What an image may be: ``numpy.memmap``, datasets of h5py and zarr, a memory map of tifffile, your own."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Three sides, or two for one channel."""

    @property
    def dtype(self) -> Any:
        """Of NumPy."""

    def __getitem__(self, index: tuple[slice, ...]) -> Any:
        """The part that one slice for each axis says, as an array that NumPy can read."""


def open_array(path: str | Path) -> SlicedArray:
    """An image file that can be sliced, by its ending.

    ``.npy`` is mapped, and so are ``.tif`` and ``.tiff`` by tifffile; compressed and tiled ones are read by
    tifffile and zarr (the first image, at full size). ``.h5`` and ``.hdf5`` are opened by h5py, ``.zarr`` by
    zarr: they hold one array, or the name of one follows after ``::``.

    Raises:
        ValueError: another ending, or no one array. FileNotFoundError: no such
            file. ImportError: the package that reads it is not installed.
    """
    name, _, inside = str(path).partition("::")
    if not Path(name).exists():
        raise FileNotFoundError(f"no image at {name}")
    ending = Path(name).suffix.lower()
    readers = {".npy": "numpy", ".tif": "tifffile", ".tiff": "tifffile", ".h5": "h5py", ".hdf5": "h5py"}
    package = {**readers, ".zarr": "zarr"}.get(ending)
    if package is None:
        raise ValueError(
            f"stream must be a .npy, .tif, .h5 or .zarr file, which can be read in parts; got {name}"
        )
    if inside and package not in ("h5py", "zarr"):
        raise ValueError(f"{name} holds one array, and none called {inside!r}")
    if importlib.util.find_spec(package) is None:
        raise ImportError(
            f"{name} needs {package!r}, which is not installed; install it with: pip install {package}"
        )
    if package == "numpy":
        return np.load(name, mmap_mode="r", allow_pickle=False)
    if package == "tifffile":
        return _tiff(name)
    return _dataset(name, inside, package)


def _tiff(name: str) -> SlicedArray:
    tifffile: Any = importlib.import_module("tifffile")
    try:
        return tifffile.memmap(name, mode="r")
    except ValueError as error:  # compressed or tiled
        if importlib.util.find_spec("zarr") is None:
            raise ImportError(
                f"{name} cannot be mapped ({error}); to read it by tiles, 'zarr' is needed, which is not "
                "installed; install it with: pip install zarr"
            ) from None
        zarr = importlib.import_module("zarr")
        return zarr.open(tifffile.imread(name, aszarr=True, level=0), mode="r")


def _dataset(name: str, inside: str, package: str) -> SlicedArray:
    module = importlib.import_module(package)
    opened = module.File(name, "r") if package == "h5py" else module.open(name, mode="r")
    if hasattr(opened, "shape") and not inside:
        return opened
    names = [inside] if inside else [key for key in opened if hasattr(opened[key], "shape")]
    if len(names) != 1 or names[0] not in opened:
        held = ", ".join(opened)
        raise ValueError(f"{name} must hold one array, or its name must follow after '::'; it holds: {held}")
    return opened[names[0]]


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
        if not hasattr(array, "shape") or not hasattr(array, "dtype") or not hasattr(array, "__getitem__"):
            raise TypeError(f"source must have a shape and a dtype and take slices, got {type(array).__name__}")
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
        kind = np.dtype(array.dtype).kind
        if kind not in "uif":
            raise TypeError(f"source must hold integers or floating-point numbers, got {array.dtype}")
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (0, in_chans):
                raise ValueError(
                    f"{name} must have one number for each of {in_chans} channels, got {len(values)}"
                )
        self.size = (sides[0], sides[1])
        self.in_chans, self.flat = in_chans, flat
        self.largest = 1.0 if kind == "f" else float(np.iinfo(array.dtype).max)
        self.mean, self.std = tuple(mean), tuple(std)

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
        part = np.array(self.array[index])  # a copy, writable and in memory
        expected = tuple(side.stop - side.start for side in index)
        if part.shape != expected:
            raise ValueError(
                f"source gave {part.shape} where {expected} was asked for, its rows {rows.start} to {rows.stop}"
            )
        return part.astype(part.dtype.newbyteorder("="), copy=False)

    def fingerprint(self) -> str:
        """By which the image is known again: shape, dtype, some of its pixels, size and time of its file."""
        height, width = self.size
        digest = hashlib.sha256(repr((tuple(self.array.shape), str(self.array.dtype), self.first)).encode())
        holder: Any = getattr(self.array, "file", self.array)  # datasets of h5py have one
        file = getattr(holder, "filename", None)
        if isinstance(file, (str, Path)) and Path(file).is_file():
            stat = Path(file).stat()
            digest.update(repr((stat.st_size, stat.st_mtime_ns)).encode())
        for i in range(SAMPLES):
            row, column = i * (height - 1) // (SAMPLES - 1), i * max(width - SAMPLE_WIDTH, 0) // (SAMPLES - 1)
            part = self._read(slice(row, row + 1), slice(column, min(column + SAMPLE_WIDTH, width)))
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()


class Embedding:
    """What a white-box Transformer embeds, by rows of tokens: the stem with a halo, and positions.

    Args:
        model: whose stem and positions.
        pixels: the image.
        padded: its size with zeros at the bottom and on the right, as a segmenter pads it.

    Attributes:
        grid_size: of the tokens.

    Raises:
        ValueError: an image that the stem cannot embed, or a stem of another class or with hooks.
    """

    def __init__(self, model: WhiteBoxTransformer, pixels: Pixels, padded: tuple[int, int]) -> None:
        self.model, self.pixels, self.padded = model, pixels, padded
        stem = model.stem
        if type(stem) not in (ConvStem, LinearStem) or call_changes(stem):
            raise ValueError(f"stem must be ConvStem or LinearStem without hooks, got {type(stem).__name__}")
        self.patch = stem.patch_size
        self.grid_size = stem.grid_size(padded)
        # An output row needs 2^k - 1 rows above its patch of 2^k, and none below; without a stride one of each.
        conv = isinstance(stem, ConvStem)
        self.above, self.below = int(conv), int(conv and self.patch == 1)
        self.along = None
        if self.grid_size != model.grid_size:
            self.along = [
                _resampling(own, side, model.pos_embed)
                for own, side in zip(model.grid_size, self.grid_size, strict=True)
            ]

    @property
    def numbers_per_token(self) -> int:
        """About how many numbers the stem holds for a token: pixels; channels that double as sides halve."""
        return 4 * self.pixels.in_chans * self.patch**2 + 3 * 15 * self.model.embed_dim

    def prefix(self) -> Tensor:
        """The class token with its position, ``(1, 1, C)``."""
        return self.model.cls_token + self.model.pos_embed[:, : self.model.num_prefix_tokens]

    def rows(self, rows: slice) -> Tensor:
        """Rows of tokens ``(1, rows * width, C)``, positions added."""
        top, bottom = max(rows.start - self.above, 0), min(rows.stop + self.below, self.grid_size[0])
        height, width = self.pixels.size
        read = slice(top * self.patch, min(bottom * self.patch, height))
        image = self.pixels.read(read, self.model.pos_embed)
        if self.padded != (height, width):
            missing = min(bottom * self.patch, self.padded[0]) - read.stop
            image = torch.nn.functional.pad(image, (0, self.padded[1] - width, 0, missing))
        tokens = self.model.stem(image)[:, :, rows.start - top :][:, :, : rows.stop - rows.start]
        return tokens.flatten(2).transpose(1, 2) + self._positions(rows)

    def _positions(self, rows: slice) -> Tensor:
        first, width = self.model.num_prefix_tokens, self.grid_size[1]
        own = self.model.pos_embed
        if self.along is None:
            return own[:, first + rows.start * width : first + rows.stop * width]
        down, across = self.along
        grid = own[0, first:].unflatten(0, self.model.grid_size).to(down.dtype)  # (h, w, C)
        strips = torch.einsum("rh,hwc->rwc", down[rows], grid)
        return torch.einsum("sw,rwc->rsc", across, strips).flatten(0, 1)[None].to(own.dtype)


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
