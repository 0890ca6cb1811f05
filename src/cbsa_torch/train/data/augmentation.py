"""Augmentation that timm would misread in silence, or break on while training, refused by name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image
from timm.data.auto_augment import posterize

from cbsa_torch._core.checks import nearest
from cbsa_torch.train.config.base import DataConfig
from cbsa_torch.train.errors import ConfigError

LARGEST = 10
"""Magnitude that timm clips to, unless mmax says otherwise."""
STD: Mapping[str, tuple[float, float]] = {"mstd": (0, 1000)}
POLICIES: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "rand": {"m": (0, 30), "n": (1, 9), "p": (0, 1), "mmax": (1, 30), "inc": (0, 1), **STD},
    "augmix": {"m": (0, LARGEST), "w": (1, 9), "d": (1, 9), "a": (0.01, 100), "b": (0, 1), **STD},
    "original": STD,
    "originalr": STD,
    "v0": STD,
    "v0r": STD,
    "3a": STD,
}
"""timm's policies, and what may follow each with its smallest and largest value."""
SETS = ("tweights", "t3a", "t3aw")
"""Sets of operations that "rand" may choose from, besides its own."""
REAL = ("mstd", "p", "a")
"""Values that need not be whole."""


def check_augmentation(config: DataConfig) -> None:
    """Refuse settings of timm's augmentation that it cannot use.

    Raises:
        ConfigError: an unknown policy, section or value in ``data.auto_augment``.
    """
    text = config.auto_augment
    if text is None:
        return
    name, *sections = text.split("-")
    if name not in POLICIES:
        raise ConfigError(
            f"data.auto_augment must begin with one of {', '.join(POLICIES)}, got "
            f"{text!r}{nearest(name, POLICIES)}"
        )
    values: dict[str, float] = {}
    for section in sections:
        if name == "rand" and section in SETS:
            continue
        key, value = _parse(section, POLICIES[name], text)
        if key in values:
            raise ConfigError(f"data.auto_augment {text!r} sets {key!r} twice")
        values[key] = value
    if values.get("m", 0) > values.get("mmax", LARGEST):
        raise ConfigError(
            f"data.auto_augment {text!r}: m must be at most {values.get('mmax', LARGEST):g}, to which timm "
            "clips it (mmax)"
        )


def keep_one_bit(transform: Any) -> None:
    """Let timm's posterising leave at least one bit, in a composition of transforms.

    At the ends of its range it asks for none, which Pillow refuses (12.3): a run with "rand-m9-mstd0.5-inc1"
    would stop after some hundred images.
    """
    for part in getattr(transform, "transforms", ()):
        operations = getattr(part, "ops", None) or itertools.chain(*getattr(part, "policy", ()))
        for operation in operations:
            if getattr(operation, "aug_fn", None) is posterize:
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    posterized: Image.Image = posterize(image, max(bits, 1), **options)
    return posterized


def _parse(section: str, allowed: Mapping[str, tuple[float, float]], text: str) -> tuple[str, float]:
    """One section as its key and value, e.g. "m9"."""
    match = re.fullmatch(r"([a-z]+)(\d{1,6}(?:\.\d{1,9})?)", section)
    key = match[1] if match else ""
    if match is None or key not in allowed:
        known = ", ".join(f"{name}<number>" for name in allowed)
        raise ConfigError(f"data.auto_augment {text!r} has an unknown section {section!r}; allowed: {known}")
    low, high = allowed[key]
    value = float(match[2])
    if not low <= value <= high or (key not in REAL and value % 1):
        kind = "a number" if key in REAL else "a whole number"
        raise ConfigError(
            f"data.auto_augment {text!r}: {key} must be {kind} in [{low:g}, {high:g}], got {match[2]}"
        )
    return key, value
