"""Bad masks and images are left out, counted and listed, and nothing else is lost."""

from __future__ import annotations

import re

import numpy as np
import pytest
from torch.utils.data import DataLoader

from cbsa_torch.images import IGNORE, DataError
from cbsa_torch.train.data import read_skipped
from cbsa_torch.train.tasks.segmentation import SegmentationDataConfig, evaluation_transform, open_segmentation
from tests.helpers.pairs import SIZE, write_image_or_mask, write_pairs


def config(root, **changes):
    return SegmentationDataConfig(root=str(root), workers=0, **changes)


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "data")


def rgb(folder):
    write_image_or_mask(folder / "masks" / "train_3.png")


def wrong_size(folder):
    write_image_or_mask(folder / "masks" / "train_3.png", [0], (6, 8))


def unknown_label(folder):
    write_image_or_mask(folder / "masks" / "train_3.png", [0, 7, 7])


def void(folder):
    write_image_or_mask(folder / "masks" / "train_3.png", [255])


def cut_short(folder):
    path = folder / "masks" / "train_3.png"
    path.write_bytes(path.read_bytes()[:45])


def no_mask(folder):
    (folder / "masks" / "train_3.png").unlink()


BAD_MASKS = {
    rgb: "mode RGB, where one number per pixel is expected",
    wrong_size: r"the mask is 6x8 pixels \(width x height\), its image .*train_3.jpg 8x6",
    unknown_label: r"unknown label 7 \(2 pixel\(s\)\); known are 0 to 2",
    void: r"unknown label 255 \(48 pixel\(s\)\).*set ignore_label",
    cut_short: "truncated",
    no_mask: r"no mask for image .*images/train_3.jpg",
}


@pytest.mark.parametrize("spoil", BAD_MASKS)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_mask_is_ignored_and_listed_and_nothing_else_is_lost(pairs, tmp_path, spoil, workers):
    spoil(pairs / "train")
    skipped = tmp_path / "run" / "skipped.txt"
    data = open_segmentation(config(pairs, max_bad_images=1), skipped=skipped).train
    before = open_segmentation(config(pairs)).train.pairs
    assert data.pairs == before
    data.transform = evaluation_transform((0.5,) * 3, (0.5,) * 3)
    masks = [mask[0] for _ in range(2) for _, mask in DataLoader(data, num_workers=workers)]
    for i, mask in enumerate(masks):
        assert mask.unique().tolist() == ([IGNORE] if i % 8 == 3 else [0, 1, 2])
        assert tuple(mask.shape) == SIZE[::-1]
    (line,) = read_skipped(skipped)
    name, _, why = line.partition("\t")
    assert name == str(pairs / "train" / "masks" / "train_3.png")
    assert re.search(BAD_MASKS[spoil], why)
    data.transform = None
    assert np.asarray(data[3][0]).std() > 0  # the image itself is kept


def test_the_list_of_what_is_left_out_may_be_named_by_a_string(pairs, tmp_path):
    no_mask(pairs / "train")
    train = open_segmentation(config(pairs), skipped=str(tmp_path / "left_out.txt")).train
    assert np.unique(train[3][1]).tolist() == [IGNORE]
    assert "no mask" in (tmp_path / "left_out.txt").read_text()


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


def test_one_bad_mask_more_than_the_limit_stops(pairs, tmp_path):
    unknown_label(pairs / "train")
    write_image_or_mask(pairs / "train" / "masks" / "train_5.png", [9])
    data = open_segmentation(config(pairs, max_bad_images=1), skipped=tmp_path / "s.txt").train
    with pytest.raises(DataError, match=r"train_5.png: unknown label 9 .*max_bad_images is 1"):
        [data[i] for i in range(8)]


def test_the_ignore_label_is_ignored(pairs):
    void(pairs / "train")
    data = open_segmentation(config(pairs, ignore_label=255, max_bad_images=0)).train
    assert np.unique(data[3][1]).tolist() == [IGNORE]
