"""The names that the API reference documents."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from tests.helpers.doc_pages import ROOT

PAGES: dict[str, list[str]] = {
    page.stem: re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    for page in sorted(Path(ROOT / "docs/reference/api").glob("*.md"))
}
"""The dotted paths on each page."""
ENTRIES = [path for paths in PAGES.values() for path in paths]
VALUES = {
    "cbsa_torch.images.IGNORE": "a number",
    "cbsa_torch.images.SPLIT_NAMES": "names",
    "cbsa_torch.parallel.ContextParallelPlan": "the type of a mapping",
}
"""Entries that are values, shown as they are: there is nothing to call, and no docstring of theirs to read."""


def find(path: str) -> Any:
    """The object at a dotted path."""
    for end in range(path.count(".") + 1, 0, -1):
        parts = path.split(".")
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise AssertionError(path)


def members(path: str) -> list[str]:
    """The entry, and the public functions and classes of a module of functions, whose page shows them all."""
    found = find(path)
    if path != "cbsa_torch.ops.counting":
        return [path]
    own = [n for n, v in vars(found).items() if getattr(v, "__module__", "") == found.__name__]
    return [path, *(f"{path}.{name}" for name in own if not name.startswith("_"))]
