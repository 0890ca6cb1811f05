"""What was read of a data set."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from cbsa_torch.images import IGNORE
from cbsa_torch.train.data.checked_images import PlainImages
from cbsa_torch.train.data.splits import Splits
from cbsa_torch.train.data.summary import class_lines, describe, labels_of, read_all


class Listed:
    """Samples that are there, with what torchvision says of their labels."""

    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return Image.new("L", (2, 2)), self.targets[index]


class Streamed(IterableDataset):
    def __iter__(self):
        yield from ((Image.new("L", (2, 2)), label) for label in (0, 2, 2))


def test_labels_are_known_without_reading_where_the_data_set_says_them():
    held_out = PlainImages(Listed(torch.tensor([0, 1, 1, 2])), indices=[3, 1])
    assert labels_of(held_out).tolist() == [2, 1]
    assert labels_of(Streamed()) is None


def test_labels_and_masks_are_counted_the_ignored_ones_apart_and_nothing_is_drawn():
    before = torch.get_rng_state()
    assert read_all(Listed([0, 2, IGNORE]), 3, 0).tolist() == [1, 1, 0, 1]
    assert read_all(Listed([0, 2, IGNORE]), 3, 0, [1]).tolist() == [0, 0, 0, 1]
    mask = np.array([[IGNORE, 1], [1, 0]])
    assert read_all(Listed([mask, mask]), 2, 1).tolist() == [2, 2, 4]
    assert read_all(Streamed(), 3, 0).tolist() == [0, 1, 0, 2]
    assert torch.equal(torch.get_rng_state(), before)


def test_lines_about_classes():
    assert class_lines("val", ["a", "b"], np.array([3, 1000]), "images") == ["a 3, b 1,000"]
    assert class_lines("val", ["a", "b"], np.array([3, 0]), "pixels") == [
        "a 100 %, b 0 %",
        "warning: no pixels of b in val",
    ]
    odd = Splits(Listed([0]), Listed([0]), None, ["caf\udce9\n"], ("left out",))
    assert describe(odd) == [
        "classes: 1 (caf\\xe9\\n)",
        *(f"{s}: 1 images (caf\\xe9\\n 1)" for s in ("train", "val")),
        "left out",
    ]
