"""A tiny segmenter, trained and to be trained, and a small emoji64."""

from __future__ import annotations

import numpy as np
import pytest

from cbsa_torch.train import train
from tests.helpers.masked_folder import tiny_segmentation, write_masked_folder
from tests.helpers.pairs import write_pairs


@pytest.fixture
def config(tmp_path):
    """Two epochs of three steps."""
    return tiny_segmentation(write_masked_folder(tmp_path / "scenes"), tmp_path / "run")


@pytest.fixture
def pairs(tmp_path):
    """A folder of a few pairs of three classes."""
    return write_pairs(tmp_path / "data")


@pytest.fixture(scope="session")
def segmenter(tmp_path_factory):
    """What ``config`` trains; tests must not change it, but may evaluate it."""
    folder = tmp_path_factory.mktemp("segmenter")
    config = tiny_segmentation(write_masked_folder(folder / "scenes"), folder / "run")
    train(config)
    return config


@pytest.fixture(scope="session")
def emoji():
    """12 emoji of three categories, each split with one colour of its own: discs in a red that tells the split (train 50, val 100, test 150), in a blue that tells the vendor."""
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
