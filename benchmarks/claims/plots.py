"""The plots of docs/claims.md."""

from __future__ import annotations

from pathlib import Path


def write() -> list[Path]:
    """Draw what there are records for; the files."""
    return []
