"""Packages of a few images in the format of those that data sets are built from."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile

import numpy as np
from PIL import Image

from cbsa_torch.train.data.fetch import animals28

CATEGORIES = ["Flags", "Objects", "People & Body"]


def make_wheel(images: object, labels: object) -> bytes:
    """A wheel with what is pickled under the names of animal-mnist's files, and code that must not run."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr("animal_mnist/__init__.py", "raise SystemExit('code of the package was run')")
        for kind, content in (("data", images), ("label", labels)):
            wheel.writestr(animals28.MEMBER.format(kind), gzip.compress(pickle.dumps(content, 4), 1))
        metadata = {
            "METADATA": "Metadata-Version: 2.1\nName: animal-mnist\nVersion: 0.4\n",
            "RECORD": "",
            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        for file, text in metadata.items():
            wheel.writestr(f"animal_mnist-0.4.dist-info/{file}", text)
    return buffer.getvalue()


def make_package(vendor: str, emoji: list[dict], drawings: np.ndarray) -> bytes:
    """A .tgz as npm has it: emoji.json, the drawings, and files that are to be left alone."""
    folder = f"package/img/{vendor}/64"
    files = {"package/emoji.json": json.dumps(emoji).encode(), "package/index.js": b"throw 1"}
    for entry, pixels in zip(emoji, drawings, strict=True):
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG")
        files[f"{folder}/{entry['image']}"] = png.getvalue()
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
