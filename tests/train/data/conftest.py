"""Data sets that expect packages of a few images."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from cbsa_torch.train.data.fetch import DATA_SETS, animals28, emoji64
from cbsa_torch.train.data.fetch.data_sets import checksum
from tests.helpers.packages import make_emoji, make_package, make_wheel


@pytest.fixture(scope="session")
def animals() -> tuple[np.ndarray, np.ndarray]:
    """250 images of each of ten classes, as the package has them; not to be changed."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (2500, 28, 28), dtype=np.uint8)
    return images, np.arange(2500) % 10


@pytest.fixture(scope="session")
def animals_wheel(animals) -> tuple[bytes, str]:
    """The package of a small animals28, and the checksum of what is built from it."""
    content = make_wheel(*animals)
    return content, checksum(animals28.build({animals28.PACKAGE.name: content}))


@pytest.fixture
def animals_file(tmp_path: Path, animals_wheel, monkeypatch) -> Path:
    """The wheel of a small animals28; the data set expects it and its arrays."""
    content, expected = animals_wheel
    path = tmp_path / "index" / animals28.PACKAGE.filename
    path.parent.mkdir()
    path.write_bytes(content)
    package = animals28.PACKAGE._replace(url=path.as_uri(), sha256=hashlib.sha256(content).hexdigest())
    data_set = DATA_SETS["animals28"]._replace(packages=(package,), checksum=expected)
    monkeypatch.setitem(DATA_SETS, "animals28", data_set)
    return path


@pytest.fixture(scope="session")
def emoji_contents() -> tuple[dict[str, bytes], str]:
    """The packages of a small emoji64 by name, and the checksum of what is built from them."""
    emoji = make_emoji(62)
    generator = np.random.default_rng(0)
    contents = {}
    for vendor, package in emoji64.PACKAGES.items():
        drawings = generator.integers(0, 256, (len(emoji), 64, 64, 4), dtype=np.uint8)
        drawings[:, :8, :, 3] = 0
        contents[package.name] = make_package(vendor, emoji, drawings)
    return contents, checksum(emoji64.build(contents))


@pytest.fixture
def emoji_files(tmp_path: Path, emoji_contents, monkeypatch) -> list[Path]:
    """The packages of a small emoji64; the data set expects them and their arrays."""
    contents, expected = emoji_contents
    paths, packages = [], []
    for package in emoji64.PACKAGES.values():
        path = tmp_path / "registry" / package.name / "-" / package.filename
        path.parent.mkdir(parents=True)
        path.write_bytes(contents[package.name])
        paths.append(path)
        digest = hashlib.sha256(contents[package.name]).hexdigest()
        packages.append(package._replace(url=path.as_uri(), sha256=digest))
    data_set = DATA_SETS["emoji64"]._replace(packages=tuple(packages), checksum=expected)
    monkeypatch.setitem(DATA_SETS, "emoji64", data_set)
    return paths
