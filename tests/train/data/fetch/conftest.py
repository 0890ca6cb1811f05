"""Packages of a few images in the format of the real ones, and data sets that expect them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cbsa_torch.train.data.fetch import DATA_SETS, animals28, emoji64
from cbsa_torch.train.data.fetch.archive import checksum

CATEGORIES = ["Flags", "Objects", "People & Body"]


def make_wheel(images: object, labels: object) -> bytes:
    """A wheel with what is pickled under the names of animal-mnist's files, and code that must not run."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr("animal_mnist/__init__.py", "raise SystemExit('code of the package was run')")
        for kind, content in (("data", images), ("label", labels)):
            wheel.writestr(animals28.MEMBER.format(kind), gzip.compress(pickle.dumps(content, 4), 1))
        for file, text in (
            ("METADATA", "Metadata-Version: 2.1\nName: animal-mnist\nVersion: 0.4\n"),
            ("RECORD", ""),
        ):
            wheel.writestr(f"animal_mnist-0.4.dist-info/{file}", text)
        tag = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr("animal_mnist-0.4.dist-info/WHEEL", tag)
    return buffer.getvalue()


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_package(vendor: str, emoji: list[dict], drawings: np.ndarray) -> bytes:
    """A .tgz as npm has it: emoji.json, the drawings, and files that are to be left alone."""
    folder = f"package/img/{vendor}/64"
    files = {"package/emoji.json": json.dumps(emoji).encode(), "package/index.js": b"throw 1"}
    files |= {f"{folder}/{e['image']}": png(d) for e, d in zip(emoji, drawings, strict=True)}
    files["package/../../escaped.png"] = files[f"package/img/{vendor}/32/small.png"] = b"not read"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as package:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def make_emoji(count: int) -> list[dict]:
    """Entries of emoji.json in a shuffled order, with one that is no emoji of its own."""
    names = ("name", "short_name", "subcategory", "added_in")
    entries = [
        {
            "unified": f"{0x1F300 + i:X}",
            "image": f"{0x1F300 + i:x}.png",
            "category": CATEGORIES[i % 3],
            "sort_order": i,
            "has_img_google": True,
            "has_img_twitter": True,
            **{key: f"{key} {i}" for key in names},
        }
        for i in range(count)
    ]
    entries[0]["category"] = "Component"
    entries[1]["has_img_twitter"] = False
    return entries[::-1]


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
    package = animals28.PACKAGE._replace(
        url=path.as_uri(), sha256=hashlib.sha256(content).hexdigest(), size=len(content)
    )
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
        packages.append(package._replace(url=path.as_uri(), sha256=digest, size=len(content)))
    data_set = DATA_SETS["emoji64"]._replace(
        packages=tuple(packages), checksum=checksum(emoji64.build(contents))
    )
    monkeypatch.setitem(DATA_SETS, "emoji64", data_set)
    return paths


@pytest.fixture
def wheel() -> Callable[..., bytes]:
    return make_wheel
