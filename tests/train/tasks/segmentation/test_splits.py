"""Segmentation data sets by name."""

from __future__ import annotations

import numpy as np
import pytest

from cbsa_torch.images import IGNORE
from cbsa_torch.train.errors import ConfigError, DataError
from cbsa_torch.train.tasks.segmentation import (
    SegmentationDataConfig,
    open_segmentation,
    open_segmentation_split,
)
from tests.helpers.pairs import NAMES, SIZE, write_image_or_mask, write_pairs


def config(root, name="folder", **changes):
    return SegmentationDataConfig(name=name, root=str(root), workers=0, **changes)


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "data")


def test_a_folder_opens_with_its_three_splits(pairs):
    splits = open_segmentation(config(pairs))
    assert [len(s) for s in splits[:3]] == [8, 3, 2]
    assert splits.class_names == NAMES
    image, mask = splits.train[0]
    assert image.size == SIZE
    assert mask.shape == SIZE[::-1]
    assert mask.dtype == np.int64
    assert mask[0, :4].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("name", "images", "masks", "labels"),
    [
        ("ade20k", "images/{}/1.jpg", "annotations/{}/1.png", [IGNORE, 0, 18]),
        ("cityscapes", "leftImg8bit/{}/ulm/1_leftImg8bit.png", "gtFine/{}/ulm/1_gtFine_labelIds.png", [IGNORE, 6, IGNORE]),
    ],
)  # fmt: skip
def test_public_data_sets_open_by_name(tmp_path, name, images, masks, labels):
    for split in ("train", "val"):
        write_image_or_mask(tmp_path / images.format(split))
        write_image_or_mask(tmp_path / masks.format(split), [0, 1, 19] if name == "ade20k" else [0, 19, 1])
    splits = open_segmentation(config(tmp_path, name))
    assert splits.val[0][1][0, :3].tolist() == labels
    assert [len(splits.train), splits.test] == [1, None]
    with pytest.raises(DataError, match="no test split"):
        open_segmentation_split(config(tmp_path, name), "RGB", "test", splits.class_names)


@pytest.mark.parametrize(("name", "count"), [("voc", 21), ("pascal_context", 60), ("pascal_context_59", 59)])
def test_listed_data_sets_open_by_name(tmp_path, name, count):
    write_image_or_mask(tmp_path / "JPEGImages" / "1.jpg")
    write_image_or_mask(tmp_path / "SegmentationClass" / "1.png", [1])
    (tmp_path / "classes.txt").write_text("\n".join(map(str, range(count))))
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("1")
    splits = open_segmentation(config(tmp_path, name))
    assert len(splits.class_names) == count
    assert splits.train[0][1][0, 0] == (0 if count == 59 else 1)


def test_without_splits_some_are_held_out_the_same_ones_always(pairs):
    (pairs / "classes.txt").rename(pairs / "train" / "classes.txt")
    first, second = (open_segmentation(config(pairs / "train", val_fraction=0.25)) for _ in range(2))
    assert [len(first.train), len(first.val)] == [6, 2]
    assert first.val.pairs == second.val.pairs
    assert not {*first.train.pairs} & {*first.val.pairs}


def test_one_split_needs_no_other(pairs):
    for split in ("train", "val"):
        (pairs / split).rename(pairs.parent / split)
    assert len(open_segmentation_split(config(pairs), "RGB", "test", NAMES)) == 2
    with pytest.raises(
        DataError, match=r"the data's 3 classes \(sky, water, sand, \.\.\.\) are not the model's 2"
    ):
        open_segmentation_split(config(pairs), "RGB", "test", ["sky", "water"])
    with pytest.raises(DataError, match="has a test split but no train split"):
        open_segmentation_split(config(pairs), "RGB", "val", NAMES)


def test_settings_that_cannot_work_are_refused(pairs, tmp_path):
    with pytest.raises(ConfigError, match=r"ignore_label is of data\.name 'folder'; 'voc' has its own"):
        open_segmentation(config(pairs, "voc", ignore_label=255))
    with pytest.raises(ConfigError, match=r"split must be one of .*, got 'validation'"):
        open_segmentation_split(config(pairs), "RGB", "validation", [])
    with pytest.raises(ConfigError, match=r"'ade2k'; did you mean 'ade20k'\?"):
        open_segmentation(config(pairs, "ade2k"))
    with pytest.raises(DataError, match="data.root is required"):
        open_segmentation(SegmentationDataConfig())
    with pytest.raises(DataError, match="is not a folder"):
        open_segmentation(config(tmp_path / "none"))
