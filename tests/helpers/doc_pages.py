"""The pages that people read, and their blocks of code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A block of code."""

    language: str
    text: str
    """As far to the left as its fence."""
    line: int
    """Of the page, on which the text begins; from 1 on."""


def read_blocks(page: str, language: str) -> list[Block]:
    """The blocks of a page in a language, from top to bottom."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(
            fence[2],
            re.sub(f"^{fence[1]}", "", fence[3], flags=re.MULTILINE),
            text[: fence.start(3)].count("\n") + 1,
        )
        for fence in FENCE.finditer(text)
        if fence[2] == language
    ]
