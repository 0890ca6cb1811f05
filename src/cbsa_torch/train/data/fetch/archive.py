"""The finished arrays as one ``.npz`` file, checked by their content whenever they are read."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cbsa_torch._core.files import write_atomically
from cbsa_torch.train.errors import DataError

Arrays = dict[str, np.ndarray]


def data_folder(folder: str | Path | None = None) -> Path:
    """The folder of the fetched data sets: ``folder``, or ``$CBSA_DATA``, or ``~/.cache/cbsa_torch``."""
    return Path(folder or os.environ.get("CBSA_DATA") or Path.home() / ".cache" / "cbsa_torch").expanduser()


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: the same for the same arrays, however they are stored."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def check_writable(folder: Path) -> None:
    """Make the folder if need be; raise DataError if no file can be written into it."""
    probe = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DataError(
            f"cannot write into {folder}: {error.strerror or error}; choose another folder with --output or "
            "the environment variable CBSA_DATA"
        ) from error


def write_archive(path: Path, arrays: Arrays) -> None:
    """Write the arrays, atomically; raises DataError if the disk does not take them."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def read_archive(path: Path, expected: str) -> Arrays:
    """Read the arrays; raises DataError unless their checksum is the expected one."""
    try:
        # opened here, as numpy leaves a file that is no archive open
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    except Exception as error:  # zlib.error and others of damaged archives
        raise DataError(f"{path} is damaged: {error}") from error
    if checksum(arrays) != expected:
        raise DataError(f"{path} does not hold the arrays that it should (checksum {checksum(arrays)})")
    return arrays
