"""What ``cbsa data fetch`` does: check the folder, get the packages, build the arrays, check, write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cbsa_torch._core.checks import nearest
from cbsa_torch.train.data.fetch import animals28, emoji64
from cbsa_torch.train.data.fetch.archive import (
    Arrays,
    check_writable,
    checksum,
    data_folder,
    read_archive,
    write_archive,
)
from cbsa_torch.train.data.fetch.download import Package, forget, obtain
from cbsa_torch.train.engine.console import Reporter
from cbsa_torch.train.errors import DataError


class PackagedDataSet(NamedTuple):
    """A data set, and how it comes about."""

    packages: tuple[Package, ...]
    build: Callable[[Mapping[str, bytes]], Arrays]
    """From the content of the packages' files, by the packages' names."""
    checksum: str
    """Of the arrays (:func:`archive.checksum`)."""
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
    reporter: Reporter | None = None,
) -> Path:
    """Build a data set from its packages, unless it is there already.

    Args:
        name: a key of ``DATA_SETS``.
        output: the folder to write ``<name>.npz`` into. Default: ``$CBSA_DATA``, else ``~/.cache/cbsa_torch``.
        sources: package files that are already here, so that they need not be downloaded.
        reporter: where to say how it goes. Default: nowhere.

    Returns:
        The file.

    Raises:
        DataError: unknown name, folder not writable, no network, wrong checksum.
    """
    reporter = reporter or Reporter(enabled=False)
    if name not in DATA_SETS:
        raise DataError(f"no data set {name!r}{nearest(name, DATA_SETS)} (there are: {', '.join(DATA_SETS)})")
    data_set = DATA_SETS[name]
    path = data_folder(output) / f"{name}.npz"
    if path.exists():
        try:
            read_archive(path, data_set.checksum)
        except DataError as error:
            reporter.say(f"{error}; fetching it again")
        else:
            reporter.say(f"{path} is there already, and its content is right")
            return path
    check_writable(path.parent)
    files = obtain(data_set.packages, sources, reporter, keep=path.parent)
    reporter.say("building the arrays and the splits")
    arrays = data_set.build(files)
    got = checksum(arrays)
    if got != data_set.checksum:
        raise DataError(
            f"the arrays built for {name} have the checksum {got}, not {data_set.checksum}; "
            "nothing was written. Please report this with the versions of numpy and Pillow"
        )
    write_archive(path, arrays)
    forget(data_set.packages, path.parent)
    reporter.say(f"{path} ({path.stat().st_size / 1e6:.1f} MB), checked; licence: {data_set.licence}")
    return path


def load(name: str, root: str | Path | None = None) -> Arrays:
    """Read a fetched data set; raises DataError, saying how to fetch it, if it is not there or damaged."""
    path = data_folder(root) / f"{name}.npz"
    command = f"cbsa data fetch {name}" + (f" --output {root}" if root else "")
    if not path.is_file():
        raise DataError(f"the data set {name} is not at {path}; get it with: {command}")
    try:
        return read_archive(path, DATA_SETS[name].checksum)
    except DataError as error:
        raise DataError(f"{error}; get it again with: {command}") from error
