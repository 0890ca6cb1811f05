"""Values of configurations: numbers that are none, and keys that had another name."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

from cbsa_torch.train.errors import ConfigError

BEFORE_LIMITS = {"skip": 10, "stop": 0}
"""What ``data.on_bad_image`` of old runs meant, as ``data.max_bad_images``."""


def check_numbers(values: dict[str, Any], prefix: str = "") -> None:
    """Refuse numbers that are not finite, wherever they are; raises ConfigError with the key."""
    for key, value in values.items():
        if isinstance(value, dict):
            check_numbers(value, f"{prefix}{key}.")
            continue
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, float) and not math.isfinite(item):
                raise ConfigError(f"{prefix}{key} must be finite, got {item}")


def check_rules(rules: Iterable[tuple[bool, str, Any]]) -> None:
    """Raise ConfigError for the first of (holds, rule, got) that does not hold."""
    for holds, rule, got in rules:
        if not holds:
            raise ConfigError(f"{rule}, got {got}")


def with_new_names(values: dict[Any, Any], known: Collection[str]) -> dict[Any, Any]:
    """Settings of an old run under their names of today.

    Args:
        values: a section as it was read.
        known: the keys that this section may have.
    """
    if "on_bad_image" not in values or "max_bad_images" not in known or "max_bad_images" in values:
        return values
    old = values["on_bad_image"]
    if old not in BEFORE_LIMITS:
        raise ConfigError(
            f"data.on_bad_image is data.max_bad_images now, a number (skip: 10, stop: 0); got {old!r}"
        )
    rest = {key: value for key, value in values.items() if key != "on_bad_image"}
    return {**rest, "max_bad_images": BEFORE_LIMITS[old]}
