"""Users' strings (names of files, classes, runs) as text that terminals, pages and figures can show."""

from __future__ import annotations

import unicodedata

_DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that change the order in which the text around them is shown."""


def readable(value: object, *, lines: bool = False) -> str:
    r"""A user's string as text that shows as one, and that every encoding of Unicode takes.

    Bytes of a file name that are no UTF-8, and control characters and others that break a line or turn its
    direction, become escapes such as ``\xe9``; so names that differ are shown differently.

    Args:
        value: a string, or what ``str`` makes one of.
        lines: keep line breaks and tabs.
    """
    return "".join(c if lines and c in "\n\t" else _shown(c) for c in str(value))


def _shown(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # Python's stand-in for a byte of a file name that it could not decode
        return f"\\x{code - 0xDC00:02x}"
    hidden = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _DIRECTIONS
    return character.encode("unicode_escape").decode() if hidden else character
