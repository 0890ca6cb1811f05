"""emoji64: 1,906 emoji as drawn by Noto Emoji and by Twemoji, 64x64 RGBA, from two npm packages.

Version 16.0.0 of ``emoji-datasource-google`` (Apache 2.0) and ``emoji-datasource-twitter`` (CC BY 4.0).
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from cbsa_torch.train.data.fetch.download import Package
from cbsa_torch.train.data.fetch.lookalikes import Pairs, close_pairs, join

_SHA256 = {
    "google": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "twitter": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
}
_URL = "https://registry.npmjs.org/emoji-datasource-{0}/-/emoji-datasource-{0}-16.0.0.tgz"
PACKAGES = {
    vendor: Package("npm", f"emoji-datasource-{vendor}", "16.0.0", _URL.format(vendor), sha256)
    for vendor, sha256 in _SHA256.items()
}
CHECKSUM = "ea69235d707a5bfe96e80ca61377ccc25892765e4af8d2350767750f594e0e46"
"""Checksum of the arrays, as ``data_sets.checksum`` computes it."""

SPLIT_NAMES = ["train", "val", "test"]
SIDE = 64
LOOKALIKE_RMS = 0.06
"""Drawings of a vendor closer than this (premultiplied RGBA in 0..1) belong together."""
HELD_OUT = 0.15
"""Share of each category in the validation and in the test split."""
LARGEST_SPLIT_GROUP = 4
"""Larger groups of look-alikes go to train."""

# The same person comes as a woman, a man and neither: by codes of their own, or by a sign after the code.
_NEUTRAL = {
    **{"1F468": "1F9D1", "1F469": "1F9D1"},  # man, woman: person
    **{"1F466": "1F9D2", "1F467": "1F9D2"},  # boy, girl: child
    **{"1F474": "1F9D3", "1F475": "1F9D3"},  # old man, old woman: older adult
    **{"1F934": "1FAC5", "1F478": "1FAC5"},  # prince, princess: person with crown
    "1F385": "1F936",  # Father and Mother Christmas
    "1F57A": "1F483",  # dancing man and woman
}
_SIGNS = {"2640", "2642", "27A1"}  # female, male, facing right; joined by 200D
_JOINER, _EMOJI_STYLE = "200D", "FE0F"


def build(files: Mapping[str, bytes]) -> dict[str, np.ndarray]:
    """From the content of both packages to the arrays; row i of every array is the same emoji."""
    members = {vendor: read_package(files[package.name], vendor) for vendor, package in PACKAGES.items()}
    listed = json.loads(members["google"]["emoji.json"])
    emoji = [e for e in listed if e["category"] != "Component" and all(e[f"has_img_{v}"] for v in PACKAGES)]
    emoji.sort(key=lambda e: e["sort_order"])
    arrays = {}
    for vendor, content in members.items():
        arrays[vendor] = np.stack([decode(content[e["image"]]) for e in emoji])
        arrays[f"fg_{vendor}"] = (arrays[vendor][..., 3] > 127).mean((1, 2)).astype(np.float32)
    categories = sorted({e["category"] for e in emoji})
    labels = [categories.index(e["category"]) for e in emoji]
    groups = group_lookalikes(emoji, [arrays[vendor] for vendor in PACKAGES])
    split = split_groups([e["unified"] for e in emoji], labels, groups.tolist())
    return {
        **arrays,
        "label": np.array(labels, np.uint8),
        "category_names": np.array(categories),
        "split": np.array(split, np.uint8),
        "split_names": np.array(SPLIT_NAMES),
        "group": groups.astype(np.uint16),
        **{
            key: np.array([e[key] for e in emoji])
            for key in ("unified", "name", "short_name", "subcategory", "added_in")
        },
    }


def read_package(data: bytes, vendor: str) -> dict[str, bytes]:
    """``emoji.json`` and the 64-pixel drawings of a package, by file name; nothing is unpacked to disk."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as package:
        for member in package:
            folder, _, name = member.name.rpartition("/")
            wanted = member.name == "package/emoji.json" or folder == f"package/img/{vendor}/{SIDE}"
            if wanted and (file := package.extractfile(member)) is not None:
                found[name] = file.read()
    return found


def decode(data: bytes) -> np.ndarray:
    """A PNG as (64, 64, 4) uint8; the colour of fully transparent pixels is set to 0."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        pixels = np.array(image.convert("RGBA"))
    pixels[pixels[..., 3] == 0] = 0
    return pixels


def group_lookalikes(emoji: Sequence[Mapping[str, Any]], drawings: Sequence[np.ndarray]) -> np.ndarray:
    """Group numbers (n,) of emoji that must not be in different splits.

    Joined are those whose drawings by one vendor are closer than ``LOOKALIKE_RMS``, those of which one replaces
    the other, and, in People & Body, those whose codes differ only in gender or in the direction they face.

    Args:
        emoji: n entries of ``emoji.json``.
        drawings: (n, 64, 64, 4) for each vendor.
    """
    pairs: Pairs = []
    for pixels in drawings:
        scaled = pixels.astype(np.float64) / 255
        scaled[..., :3] *= scaled[..., 3:]
        flat = scaled.reshape(len(scaled), -1)
        pairs += close_pairs(flat, flat, LOOKALIKE_RMS)
    place = {e["unified"]: i for i, e in enumerate(emoji)}
    people: dict[str, int] = {}
    for i, e in enumerate(emoji):
        others = (place.get(e.get(key)) for key in ("obsoletes", "obsoleted_by"))
        pairs += [(i, other) for other in others if other is not None]
        if e["category"] == "People & Body":
            pairs.append((i, people.setdefault(without_gender(e["unified"]), i)))
    return join(len(emoji), pairs)


def without_gender(unified: str) -> str:
    """A code sequence without what says gender or facing direction."""
    codes = [_NEUTRAL.get(code, code) for code in unified.split("-") if code != _EMOJI_STYLE]
    kept = [
        code
        for code, before, after in zip(codes, ["", *codes], [*codes[1:], ""], strict=False)
        if not (code in _SIGNS and before == _JOINER) and not (code == _JOINER and after in _SIGNS)
    ]
    return "-".join(kept)


def split_groups(codes: Sequence[str], labels: Sequence[int], groups: Sequence[int]) -> list[int]:
    """The split of each emoji, an index into ``SPLIT_NAMES``; no group is split.

    In each category the groups, ordered by the SHA-256 of ``emoji64/v1/`` and their smallest code, fill test up
    to 15 % of its emoji, then val; a group that no longer fits is passed over. The rest is train, and so are
    groups of more than four and those across categories.
    """
    members: dict[int, list[int]] = {}
    for i, number in enumerate(groups):
        members.setdefault(number, []).append(i)
    ordered = sorted(
        members.values(),
        key=lambda group: hashlib.sha256(f"emoji64/v1/{min(codes[i] for i in group)}".encode()).digest(),
    )
    sizes = Counter(labels)
    room = {(label, part): round(HELD_OUT * sizes[label]) for label in sizes for part in ("test", "val")}
    split = [SPLIT_NAMES.index("train")] * len(codes)
    for group in ordered:
        label = labels[group[0]]
        if len(group) > LARGEST_SPLIT_GROUP or any(labels[i] != label for i in group):
            continue
        part = next((part for part in ("test", "val") if len(group) <= room[label, part]), None)
        if part is not None:
            room[label, part] -= len(group)
            for i in group:
                split[i] = SPLIT_NAMES.index(part)
    return split
