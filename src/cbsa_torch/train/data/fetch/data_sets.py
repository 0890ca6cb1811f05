"""Data sets built from packages: get the packages, build the arrays, check them, keep them as ``.npz``."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cbsa_torch._core.checks import nearest
from cbsa_torch._core.files import write_atomically
from cbsa_torch.images.errors import DataError
from cbsa_torch.train.data.fetch import animals28, emoji64
from cbsa_torch.train.data.fetch.download import Package, obtain

Arrays = dict[str, np.ndarray]


class PackagedDataSet(NamedTuple):
    """A data set, and how it comes about."""

    packages: tuple[Package, ...]
    build: Callable[[Mapping[str, bytes]], Arrays]
    """From the content of the packages' files, by the packages' names."""
    checksum: str
    """What :func:`checksum` gives for the arrays."""
    licence: str
    """Who drew it and on what terms it may be used, in a line."""


DATA_SETS = {
    "animals28": PackagedDataSet(
        (animals28.PACKAGE,),
        animals28.build,
        animals28.CHECKSUM,
        "MIT, Copyright (c) 2025 SinaSR-6",
    ),
    "emoji64": PackagedDataSet(
        tuple(emoji64.PACKAGES.values()),
        emoji64.build,
        emoji64.CHECKSUM,
        "Noto Emoji: Apache 2.0; Twemoji, by Twitter, Inc and other contributors: CC BY 4.0; "
        "emoji-data: MIT, Copyright (c) 2013 Cal Henderson",
    ),
}


def fetch(
    name: str,
    output: str | Path | None = None,
    sources: Sequence[str | Path] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Build a data set from its packages, unless it is there already.

    Args:
        name: a key of ``DATA_SETS``.
        output: the folder to write ``<name>.npz`` into. Default: ``$CBSA_DATA``, else ``~/.cache/cbsa_torch``.
        sources: package files that are already here, so that they need not be downloaded.
        say: called with what is being done. Default: nothing is said.

    Returns:
        The file.

    Raises:
        DataError: unknown name, folder not writable, no network, wrong checksum.
    """
    if name not in DATA_SETS:
        raise DataError(f"no data set {name!r}{nearest(name, DATA_SETS)} (there are: {', '.join(DATA_SETS)})")
    data_set = DATA_SETS[name]
    path = data_folder(output) / f"{name}.npz"
    if path.exists():
        try:
            read_arrays(path, data_set.checksum)
        except DataError as error:
            say(f"{error}; fetching it again")
        else:
            say(f"{path} is there already, and its content is right")
            return path
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    arrays = data_set.build(obtain(data_set.packages, sources, say))
    if checksum(arrays) != data_set.checksum:
        raise DataError(
            f"the arrays built for {name} have the checksum {checksum(arrays)}, not {data_set.checksum}; "
            "nothing was written. Please report this with the versions of numpy and Pillow"
        )
    with _naming(path):
        write_arrays(path, arrays)
    say(f"{path} ({path.stat().st_size / 1e6:.1f} MB), checked; licence: {data_set.licence}")
    return path


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say of an error of the disk that the file cannot be written, and what to do."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}; choose another folder with --output or the "
            "environment variable CBSA_DATA"
        ) from error


def load(name: str, root: str | Path | None = None) -> Arrays:
    """Read a fetched data set; raises DataError, saying how to fetch it, if it is not there or damaged."""
    path = data_folder(root) / f"{name}.npz"
    command = f"cbsa data fetch {name}" + (f" --output {root}" if root else "")
    if not path.is_file():
        raise DataError(f"the data set {name} is not at {path}; get it with: {command}")
    try:
        return read_arrays(path, DATA_SETS[name].checksum)
    except DataError as error:
        raise DataError(f"{error}; get it again with: {command}") from error


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


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write the arrays, atomically; the same arrays make the same file."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomically(path, buffer.getvalue())


def read_arrays(path: Path, expected: str) -> Arrays:
    """Read the arrays; raises DataError unless their checksum is the expected one."""
    try:
        # opened here, as numpy leaves a file that is no archive open
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # a damaged archive raises nearly anything: OSError, KeyError, zlib.error ...
        raise DataError(f"cannot read {path}: {error}") from error
    if checksum(arrays) != expected:
        raise DataError(f"{path} does not hold the arrays that it should (checksum {checksum(arrays)})")
    return arrays
