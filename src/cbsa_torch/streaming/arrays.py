"""Arrays that are read in parts, and files of them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np


class SlicedArray(Protocol):
    """What is read: ``numpy.memmap``, datasets of h5py and zarr, a memory map of tifffile, your own.

    Examples:
        >>> import numpy as np
        >>> from cbsa_torch.streaming import SlicedArray
        >>> def first_row(array: SlicedArray) -> np.ndarray:
        ...     return np.asarray(array[:1])
        >>> first_row(np.zeros((64, 96, 3), np.uint8)).shape
        (1, 96, 3)
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """All sides."""

    @property
    def dtype(self) -> Any:
        """Of NumPy."""

    def __getitem__(self, index: tuple[slice, ...]) -> Any:
        """The part that one slice for each axis says, as an array that NumPy can read."""


def open_array(path: str | Path) -> SlicedArray:
    """A file that can be sliced, by its ending.

    ``.npy`` is mapped, and so are ``.tif`` and ``.tiff`` by tifffile; compressed and tiled ones are read by
    tifffile and zarr (the first image, at full size). ``.h5`` and ``.hdf5`` are opened by h5py, ``.zarr`` by
    zarr: they hold one array, or the name of one follows after ``::``.

    Raises:
        ValueError: another ending, or no one array. FileNotFoundError: no such
            file. ImportError: the package that reads it is not installed.

    Examples:
        >>> import numpy as np
        >>> from cbsa_torch.streaming import open_array
        >>> np.save("scan.npy", np.zeros((64, 96, 3), np.uint8))
        >>> open_array("scan.npy")[:8].shape  # a memory map: nothing else is read
        (8, 96, 3)
    """
    name, package, inside = _reader(path)
    if package == "numpy":
        with _readable(name):
            return np.load(name, mmap_mode="r", allow_pickle=False)
    if package == "tifffile":
        with _readable(name):
            return _tiff(name)
    opened = _group(name, package)
    if hasattr(opened, "shape") and not inside:
        return cast(SlicedArray, opened)
    names = [inside] if inside else [key for key in opened if hasattr(opened[key], "shape")]
    if len(names) != 1 or names[0] not in opened:
        held = ", ".join(opened)
        raise ValueError(f"{name} must hold one array, or its name must follow after '::'; it holds: {held}")
    return cast(SlicedArray, opened[names[0]])


def open_features(path: str | Path) -> tuple[SlicedArray, SlicedArray | None]:
    """The features of a set and the coordinates, if there are any.

    A ``.h5`` or ``.zarr`` has ``features`` and perhaps ``coords``, as TRIDENT and CLAM write them; other files,
    and those with ``::NAME``, hold the features alone.

    Raises:
        ValueError, FileNotFoundError, ImportError: as :func:`open_array`, and no array ``features``.

    Examples:
        >>> from cbsa_torch.streaming import open_features
        >>> features, coords = open_features("slide.h5")
        >>> features.shape, coords.shape
        ((50, 16), (50, 2))
    """
    name, package, inside = _reader(path)
    if inside or package not in ("h5py", "zarr"):
        return open_array(path), None
    opened = _group(name, package)
    if hasattr(opened, "shape"):
        return opened, None
    if "features" not in opened:
        raise ValueError(f"{name} must hold an array 'features'; it holds: {', '.join(opened) or 'nothing'}")
    return opened["features"], opened.get("coords")


def _reader(path: str | Path) -> tuple[str, str, str]:
    """The file, the package that reads it, and what follows after ``::``."""
    name, _, inside = str(path).partition("::")
    if not Path(name).exists():
        raise FileNotFoundError(f"no file {name}")
    readers = {".npy": "numpy", ".tif": "tifffile", ".tiff": "tifffile", ".h5": "h5py", ".hdf5": "h5py"}
    package = {**readers, ".zarr": "zarr"}.get(Path(name).suffix.lower())
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
    return name, package, inside


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


def _group(name: str, package: str) -> Any:
    module = importlib.import_module(package)
    with _readable(name):
        return module.File(name, "r") if package == "h5py" else module.open(name, mode="r")


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Raise ValueError for what packages raise of their own where a file is none of theirs."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise ValueError(f"{name} cannot be read: {error}") from None


def check_array(name: str, array: Any) -> str:
    """Raise TypeError unless it is an array of real numbers; returns the kind of its dtype, of NumPy."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype") or not hasattr(array, "__getitem__"):
        raise TypeError(f"{name} must have a shape and a dtype and take slices, got {type(array).__name__}")
    try:
        dtype = np.dtype(array.dtype)
    except TypeError:  # another library's
        dtype = np.dtype(object)
    if dtype.kind not in ("u", "i", "f") or dtype.itemsize > 8:
        raise TypeError(
            f"{name} must hold integers or floating-point numbers of NumPy, of at most 64 bits, got "
            f"{array.dtype}"
        )
    return dtype.kind


def read_part(name: str, array: SlicedArray, index: tuple[slice, ...]) -> np.ndarray[Any, Any]:
    """A part as an array of its own, in memory and writable.

    Raises:
        ValueError: it is not all there, or some of it is masked.
    """
    given = array[index]
    if np.ma.is_masked(given):
        raise ValueError(f"{name} has masked numbers: fill them first, {type(given).__name__}.filled()")
    part = np.array(given)
    expected = tuple(side.stop - side.start for side in index)
    if part.shape != expected:
        asked = ", ".join(f"{side.start}:{side.stop}" for side in index)
        raise ValueError(f"{name} gave {part.shape} where {expected} was asked for, at [{asked}]")
    return part.astype(part.dtype.newbyteorder("="), copy=False)


def file_facts(array: SlicedArray) -> bytes:
    """Size and time of an array's file, where it has one."""
    holder: Any = getattr(array, "file", array)  # datasets of h5py have one
    file = getattr(holder, "filename", None)
    if not isinstance(file, (str, Path)) or not Path(file).is_file():
        return b""
    stat = Path(file).stat()
    return repr((stat.st_size, stat.st_mtime_ns)).encode()
