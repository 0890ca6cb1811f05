"""``metrics.jsonl``: one line per epoch, read with everything left aside that a run did not write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LONGEST = 100_000
"""Bytes of a line; those of a run have a few hundred."""


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a file of metrics, and what is wrong with its other lines; no file is no rows.

    A row is a mapping of names to numbers (or None) with an ``epoch`` from 1 on.
    """
    if not path.exists():
        return [], []
    rows, problems = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(_row(line))
        except ValueError as error:
            problems.append(f"{path}, line {number}, is left aside: {error}")
    return rows, problems


def _row(line: bytes) -> dict[str, Any]:
    if len(line) > LONGEST:
        raise ValueError(f"it has {len(line)} bytes")
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except (ValueError, RecursionError):  # cut short by a killed process, perhaps
        raise ValueError("it is not a whole line of JSON") from None
    if not isinstance(row, dict):
        raise ValueError("it is not a mapping of names to numbers")
    strange = [key for key, value in row.items() if value is not None and not _is_number(value)]
    if strange:
        raise ValueError(f"it has a {strange[0][:40]!r} that is not a number")
    epoch = row.get("epoch")
    if not isinstance(epoch, int) or epoch < 1:
        raise ValueError("it has no epoch")
    return row


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) < 2**63
