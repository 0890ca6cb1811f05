"""The pages that people read, and their blocks of code."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```\n", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A block of code."""

    text: str
    """As far to the left as its fence."""
    line: int
    """Of the page, on which the text begins; from 1 on."""
    shown: str | None
    """What a block of text right below says that it prints."""


def read_blocks(page: str, language: str) -> list[Block]:
    """The blocks of a page in a language, from top to bottom."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fences = list(FENCE.finditer(text))
    blocks = []
    for fence, after in pairwise([*fences, None]):
        if fence[2] == language:
            shown = after and after[2] == "text" and not text[fence.end() : after.start()].strip()
            code = re.sub(f"^{fence[1]}", "", fence[3], flags=re.MULTILINE)
            blocks.append(Block(code, text[: fence.start(3)].count("\n") + 1, after[3] if shown else None))
    return blocks


def error_messages() -> list[str]:
    """The messages that the page of errors quotes, without the class or ``cbsa:`` before them."""
    text = (ROOT / "docs/reference/errors.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^``` \{\.text \.message\}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [
        message.rstrip()
        for block in blocks
        for message in re.split(r"^(?:cbsa|\w+Error): ", block, flags=re.MULTILINE)[1:]
    ]
