"""Data sets that expect packages of a few images."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from cbsa_torch.train.data.fetch import DATA_SETS, animals28, emoji64
from cbsa_torch.train.data.fetch.data_sets import checksum
from tests.helpers.packages import make_emoji, make_package, make_wheel


@pytest.fixture
def animals() -> tuple[np.ndarray, np.ndarray]:
    """250 images of each of ten classes, as the package has them."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (2500, 28, 28), dtype=np.uint8)
    return images, np.arange(2500) % 10


@pytest.fixture
def animals_file(tmp_path: Path, animals, monkeypatch) -> Path:
    """The wheel of a small animals28; the data set expects it and its arrays."""
    content = make_wheel(*animals)
    path = tmp_path / "index" / animals28.PACKAGE.filename
    path.parent.mkdir()
    path.write_bytes(content)
    package = animals28.PACKAGE._replace(url=path.as_uri(), sha256=hashlib.sha256(content).hexdigest())
    expected = checksum(animals28.build({package.name: content}))
    data_set = DATA_SETS["animals28"]._replace(packages=(package,), checksum=expected)
    monkeypatch.setitem(DATA_SETS, "animals28", data_set)
    return path


@pytest.fixture
def emoji_files(tmp_path: Path, monkeypatch) -> list[Path]:
    """The packages of a small emoji64; the data set expects them and their arrays."""
    emoji = make_emoji(62)
    generator = np.random.default_rng(0)
    paths, packages, contents = [], [], {}
    for vendor, package in emoji64.PACKAGES.items():
        drawings = generator.integers(0, 256, (len(emoji), 64, 64, 4), dtype=np.uint8)
        drawings[:, :8, :, 3] = 0
        content = contents[package.name] = make_package(vendor, emoji, drawings)
        path = tmp_path / "registry" / package.name / "-" / package.filename
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        paths.append(path)
        digest = hashlib.sha256(content).hexdigest()
        packages.append(package._replace(url=path.as_uri(), sha256=digest))
    data_set = DATA_SETS["emoji64"]._replace(
        packages=tuple(packages), checksum=checksum(emoji64.build(contents))
    )
    monkeypatch.setitem(DATA_SETS, "emoji64", data_set)
    return paths
