"""Segmentation data sets by name."""

from __future__ import annotations

import numpy as np
import pytest

from cbsa_torch.images import layouts
from cbsa_torch.train.errors import ConfigError, DataError
from cbsa_torch.train.tasks.segmentation import (
    SegmentationDataConfig,
    open_segmentation,
    open_segmentation_split,
)
from tests.helpers.pairs import NAMES, SIZE


def config(root, name="folder", **changes):
    return SegmentationDataConfig(name=name, root=str(root), workers=0, **changes)


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
    ("name", "opener", "arguments"),
    [
        ("ade20k", "open_ade20k", ()),
        ("voc", "open_voc", ()),
        ("pascal_context", "open_pascal_context", (60,)),
        ("pascal_context_59", "open_pascal_context", (59,)),
        ("cityscapes", "open_cityscapes", ()),
    ],
)
def test_public_data_sets_open_by_name(pairs, monkeypatch, name, opener, arguments):
    layout = layouts.open_image_mask_folders(pairs, None)
    del layout.splits["test"]
    called = []
    monkeypatch.setattr(layouts, opener, lambda *given: called.append(given) or layout)
    splits = open_segmentation(config(pairs, name))
    assert called == [(pairs, *arguments)]
    assert [len(splits.train), len(splits.val), splits.test] == [8, 3, None]
    with pytest.raises(DataError, match="no test split"):
        open_segmentation_split(config(pairs, name), "RGB", "test", NAMES)
    del layout.splits["val"]
    with pytest.raises(DataError, match="no validation split"):
        open_segmentation(config(pairs, name))


def test_without_splits_some_are_held_out_the_same_ones_always(pairs):
    (pairs / "classes.txt").rename(pairs / "train" / "classes.txt")
    first, second = (open_segmentation(config(pairs / "train", val_fraction=0.25)) for _ in range(2))
    assert [len(first.train), len(first.val)] == [6, 2]
    assert first.val.pairs == second.val.pairs
    assert not {*first.train.pairs} & {*first.val.pairs}


def test_one_split_needs_no_other(pairs):
    for split in ("train", "val"):
        (pairs / split).rename(pairs.parent / split)
    name, test, _ = open_segmentation_split(config(pairs), "RGB", "test", NAMES)
    assert (name, len(test)) == ("test", 2)
    with pytest.raises(
        DataError, match=r"the data's 3 classes \(sky, water, sand\) are not the model's 2 \(sky, water\)"
    ):
        open_segmentation_split(config(pairs), "RGB", "test", ["sky", "water"])
    with pytest.raises(DataError, match="has no train split; test is "):
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
