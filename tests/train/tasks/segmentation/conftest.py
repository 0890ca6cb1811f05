"""A small emoji64: 12 emoji of three categories, each split with one colour of its own."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(scope="session")
def emoji():
    """Discs in a red that tells the split (train 50, val 100, test 150), in a blue that tells the vendor."""
    count = 12
    y, x = np.mgrid[:64, :64] - 31.5
    disc = np.clip(30 - np.hypot(x, y), 0, 1)
    split = np.arange(count) // 3 % 3
    arrays = {}
    for vendor, blue in (("google", 0), ("twitter", 255)):
        drawings = np.zeros((count, 64, 64, 4), dtype=np.uint8)
        drawings[..., 0] = (50 + 50 * split)[:, None, None]
        drawings[..., 2] = blue
        drawings[..., 3] = 255 * disc
        arrays[vendor] = drawings
    return {
        **arrays,
        "label": (np.arange(count) % 3).astype(np.uint8),
        "category_names": np.array(["Flags", "Objects", "Symbols"]),
        "split": split.astype(np.uint8),
        "split_names": np.array(["train", "val", "test"]),
    }
