"""Bad masks and images are left out, counted and listed, and nothing else is lost."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from cbsa_torch.images import IGNORE, DataError
from cbsa_torch.train.data import read_skipped
from cbsa_torch.train.tasks.segmentation import SegmentationDataConfig, evaluation_transform, open_segmentation
from tests.helpers.pairs import SIZE, write_image_or_mask


def config(root, **changes):
    return SegmentationDataConfig(root=str(root), workers=0, **changes)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:45])


BAD_MASKS = {
    "colours": (write_image_or_mask, "mode RGB, where one number per pixel is expected"),
    "size": (
        lambda path: write_image_or_mask(path, [0], (6, 8)),
        r"the mask is 6x8 pixels \(width x height\), its image .*train_3.jpg 8x6",
    ),
    "label": (
        lambda path: write_image_or_mask(path, [0, 7, 7]),
        r"unknown label 7 \(2 pixel\(s\)\); known are 0 to 2",
    ),
    "void": (
        lambda path: write_image_or_mask(path, [255]),
        r"unknown label 255 \(48 pixel\(s\)\).*set data.ignore_label",
    ),
    "cut short": (cut_short, "truncated"),
    "missing": (Path.unlink, r"no mask for image .*images/train_3.jpg"),
}


@pytest.mark.parametrize(("kind", "workers"), [*((kind, 0) for kind in BAD_MASKS), ("missing", 1)])
def test_a_bad_mask_is_ignored_and_listed_and_nothing_else_is_lost(pairs, tmp_path, kind, workers):
    spoil, why = BAD_MASKS[kind]
    bad = pairs / "train" / "masks" / "train_3.png"
    before = open_segmentation(config(pairs)).train.pairs
    spoil(bad)
    skipped = tmp_path / "run" / "skipped.txt"
    data = open_segmentation(config(pairs, max_bad_images=1), skipped=str(skipped)).train
    assert data.pairs == before
    data.transform = evaluation_transform((0.5,) * 3, (0.5,) * 3)
    masks = [mask[0] for _ in range(2) for _, mask in DataLoader(data, num_workers=workers)]
    for i, mask in enumerate(masks):
        assert mask.unique().tolist() == ([IGNORE] if i % 8 == 3 else [0, 1, 2])
        assert tuple(mask.shape) == SIZE[::-1]
    (line,) = read_skipped(skipped)
    assert re.search(f"^{bad}\t.*{why}", line)
    data.transform = None
    assert np.asarray(data[3][0]).std() > 0  # the image itself is kept


@pytest.mark.parametrize("missing", [True, False])
def test_a_bad_image_is_blank_and_ignored(pairs, tmp_path, missing):
    path = pairs / "train" / "images" / "train_3.jpg"
    path.unlink() if missing else path.write_bytes(b"")
    data = open_segmentation(config(pairs), skipped=tmp_path / "s.txt").train
    assert len(data) == 8
    image, mask = data[3]
    assert np.unique(mask).tolist() == [IGNORE]
    assert mask.shape == image.size[::-1]
    (line,) = read_skipped(tmp_path / "s.txt")
    assert line.startswith(f"{path}\t")
    assert ("no image for mask" in line) == missing


def test_one_bad_mask_more_than_the_limit_stops_and_ignored_labels_are_not_bad(pairs, tmp_path):
    masks = pairs / "train" / "masks"
    write_image_or_mask(masks / "train_3.png", [255])
    data = open_segmentation(config(pairs, ignore_label=255, max_bad_images=0)).train
    assert np.unique(data[3][1]).tolist() == [IGNORE]
    write_image_or_mask(masks / "train_5.png", [9])
    data = open_segmentation(config(pairs, max_bad_images=1), skipped=tmp_path / "s.txt").train
    with pytest.raises(DataError, match=r"train_5.png: unknown label 9 .*max_bad_images is 1"):
        [data[i] for i in range(8)]
