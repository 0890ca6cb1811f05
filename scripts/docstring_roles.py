"""Roles in docstrings (``:func:`NAME```) become links to the API reference, or code if it has no such name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

PAGES = Path(__file__).parents[1] / "docs/reference/api"
ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`([^`]+)`")


def documented() -> dict[str, str]:
    """The names that the pages of the reference document, by their last part."""
    texts = (page.read_text(encoding="utf-8") for page in PAGES.glob("*.md"))
    paths = [path for text in texts for path in re.findall(r"^::: (\S+)$", text, re.MULTILINE)]
    return {path.rpartition(".")[2]: path for path in paths}


class Roles(griffe.Extension):
    """Rewrites the docstrings of everything that griffe reads."""

    def __init__(self) -> None:
        self._documented = documented()

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(self._link, obj.docstring.value)

    def _link(self, role: re.Match[str]) -> str:
        path = self._documented.get(role[1].rpartition(".")[2])
        return f"`{role[1]}`" if path is None else f"[`{role[1]}`][{path}]"
