"""What a checkpoint says about the machine it was trained on, and how it is left out before others see it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

PRIVATE = {
    "output": (),
    "data": ("root",),
    "model": ("init_from", "encoder_from", "original"),
    "distill": ("teacher",),
    "resume": (),
    "overwrite": (),
}
"""Settings that tell of the machine, by section; an empty tuple stands for the whole."""


def without_paths(info: Mapping[str, Any]) -> dict[str, Any]:
    """The description without the folders of the machine that trained; what is left out has its default."""
    cleaned = dict(info)
    if isinstance(info.get("config"), Mapping):
        config = {key: value for key, value in info["config"].items() if PRIVATE.get(key) != ()}
        for section, keys in PRIVATE.items():
            if keys and isinstance(config.get(section), Mapping):
                config[section] = {k: v for k, v in config[section].items() if k not in keys}
        cleaned["config"] = {key: _without_absolute_paths(value) for key, value in config.items()}
    return cleaned


def _without_absolute_paths(value: Any) -> Any:
    """Leave out entries whose text is an absolute path, wherever they are."""
    if isinstance(value, Mapping):
        return {key: _without_absolute_paths(item) for key, item in value.items() if not _is_absolute(item)}
    return value


def _is_absolute(value: Any) -> bool:
    return isinstance(value, str) and re.match(r"[/~\\]|[A-Za-z]:[/\\]|file:", value) is not None
