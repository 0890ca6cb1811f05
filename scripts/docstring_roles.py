"""What docstrings become in the API reference.

Roles (``:func:`NAME```) become links, or code if the reference has no such name. Errors that share a line of
"Raises" get lines of their own. "Returns" begins with the type: what is before a colon would be taken for it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

PAGES = Path(__file__).parents[1] / "docs/reference/api"
ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`([^`]+)`")
RAISES = re.compile(r"^Raises:\n(?: +.*\n?)+", re.MULTILINE)
NEXT_ERROR = re.compile(r"\.\s+((?:[A-Z]\w*Error, )*[A-Z]\w*Error):\s+")


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
            text = RAISES.sub(lambda found: NEXT_ERROR.sub(r".\n    \1: ", found[0]), obj.docstring.value)
            if isinstance(obj, griffe.Function) and obj.returns is not None:
                text = text.replace("\nReturns:\n    ", f"\nReturns:\n    {obj.returns}: ")
            obj.docstring.value = ROLE.sub(self._link, text)

    def _link(self, role: re.Match[str]) -> str:
        name, last = role[1].lstrip("~"), role[1].rpartition(".")[2]
        shown = last if name != role[1] else name
        path = self._documented.get(last)
        return f"`{shown}`" if path is None else f"[`{shown}`][{path}]"
