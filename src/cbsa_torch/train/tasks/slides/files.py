"""Files of tile features: the HDF5 that TRIDENT and CLAM write, and PyTorch files of one tensor.

A ``.h5`` has the datasets ``features`` ``(N, D)`` (or ``(1, N, D)``) and ``coords`` ``(N, 2)``, the upper left
corners of the tiles in pixels of level 0; TRIDENT's ``coords`` have the attribute ``patch_size_level0``, the
tiles' side in the same pixels. A ``.pt`` is one tensor ``(N, D)`` without coordinates; nothing in it is
executed.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cbsa_torch._core.optional import require
from cbsa_torch.train.errors import DataError

SUFFIXES = (".h5", ".pt")
ROWS_CHECKED = 16384
"""Tiles that are looked at together for values that are not finite."""


class Slide(NamedTuple):
    """The tiles of one slide."""

    features: Tensor
    """``(N, D)`` float32."""
    coords: Tensor | None
    """``(N, 2)`` x and y of the tiles' corners, int64 or float64; None if the file has none."""
    tile_size: float | None
    """Side of a tile in the unit of the coordinates; None if the file does not say."""


class SlideHeader(NamedTuple):
    """What a file says without its features being read."""

    tiles: int
    """N, at least 1."""
    width: int
    """D."""
    has_coords: bool


def find_file(root: Path, name: str) -> Path:
    """The file of a slide by its name, with or without suffix; raises DataError that names it."""
    if name.endswith(SUFFIXES):
        if (root / name).is_file():
            return root / name
        raise DataError(f"slide {name!r}: no such file in {root}")
    there = [path for suffix in SUFFIXES if (path := root / f"{name}{suffix}").is_file()]
    if not there:
        raise DataError(
            f"slide {name!r}: neither {name}.h5 nor {name}.pt is in {root}; features of its tiles are needed, "
            "not its picture"
        )
    if len(there) > 1:
        raise DataError(f"slide {name!r}: both {name}.h5 and {name}.pt are in {root}; write the suffix, too")
    return there[0]


def read_header(path: Path) -> SlideHeader:
    """Shapes of features and coordinates, checked; the features are not read.

    Raises:
        DataError: not such a file, or shapes that do not fit each other; it names the file.
    """
    if path.suffix == ".pt":
        features = _load(path)
        return SlideHeader(*_matrix(path, "the tensor", tuple(features.shape)), False)
    with _open(path) as file:
        return _header(path, file)


def read_slide(path: Path) -> Slide:
    """Read a slide's features and coordinates.

    Raises:
        DataError: as :func:`read_header`, and features or coordinates that are not finite.
    """
    coords = tile_size = None
    if path.suffix == ".pt":
        features = _load(path)
        tiles, width = _matrix(path, "the tensor", tuple(features.shape))
        features = features.reshape(tiles, width).float()
    else:
        with _open(path) as file:
            header = _header(path, file)
            features = torch.from_numpy(_read(path, file, "features", np.float32))
            features = features.reshape(header.tiles, header.width)
            if header.has_coords:
                whole = np.issubdtype(file["coords"].dtype, np.integer)
                coords = torch.from_numpy(_read(path, file, "coords", np.int64 if whole else np.float64))
                coords = coords.reshape(header.tiles, 2)
                tile_size = _tile_size(path, file["coords"].attrs.get("patch_size_level0"))
    _check_finite(path, "features", features)
    if coords is not None:
        _check_finite(path, "coordinates", coords)
    return Slide(features, coords, tile_size)


def _header(path: Path, file: Any) -> SlideHeader:
    if "features" not in file or not hasattr(file["features"], "shape"):
        there = ", ".join(file) or "nothing"
        raise DataError(f"{path} has no dataset 'features' (it holds {there})")
    tiles, width = _matrix(path, "features", file["features"].shape)
    if "coords" not in file:
        return SlideHeader(tiles, width, False)
    if not hasattr(file["coords"], "shape"):
        raise DataError(f"{path}: coords must be a dataset, got a group")
    given = tuple(file["coords"].shape)
    if given not in ((tiles, 2), (1, tiles, 2)):
        raise DataError(
            f"{path}: coords must have shape ({tiles}, 2) as there are {tiles} features, got {given}"
        )
    return SlideHeader(tiles, width, True)


def _matrix(path: Path, what: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """N and D of features; neither may be 0."""
    sides = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    if len(sides) != 2 or 0 in sides:
        raise DataError(f"{path}: {what} must have shape (N, D), at least one tile, got {tuple(shape)}")
    return sides[0], sides[1]


def _check_finite(path: Path, what: str, values: Tensor) -> None:
    for start, rows in enumerate(values.split(ROWS_CHECKED)):  # no mask as large as the features
        bad = ~rows.isfinite().all(1)
        if bad.any():
            row = start * ROWS_CHECKED + int(bad.nonzero()[0])
            raise DataError(f"{path} has {what} that are not finite, first in row {row}")


def _tile_size(path: Path, value: Any) -> float | None:
    if value is None:
        return None
    try:
        size = float(value)
    except (TypeError, ValueError):
        size = math.nan
    if not 0 < size < math.inf:
        raise DataError(f"{path}: patch_size_level0 of coords must be a positive number, got {value!r}")
    return size


def _open(path: Path) -> Any:
    require("slides")
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path} cannot be read as HDF5: {error}") from error


def _read(path: Path, file: Any, name: str, dtype: Any) -> np.ndarray:
    try:
        values: np.ndarray = file[name].astype(dtype)[...]
    except (OSError, TypeError, ValueError) as error:
        raise DataError(f"{path}: {name} cannot be read: {error}") from error
    return values


def _load(path: Path) -> Tensor:
    """A tensor whose values are read when they are needed."""
    try:
        mapped = zipfile.is_zipfile(path)  # the files of old versions of PyTorch are none
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} holds something other than tensors, which would need executing pickled code; refused"
        ) from error
    except Exception as error:  # a broken file raises nearly anything
        raise DataError(f"{path} cannot be read as a PyTorch file: {error}") from error
    if not isinstance(content, Tensor) or not content.is_floating_point():
        kind = content.dtype if isinstance(content, Tensor) else type(content).__name__
        raise DataError(f"{path} must hold one floating-point tensor (N, D), got {kind}")
    return content.detach()
