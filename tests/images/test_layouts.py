"""The folders of public data sets and of anyone's images and masks: files that belong together, and their labels."""

from __future__ import annotations

import numpy as np
import pytest
from torchvision.datasets import Cityscapes
from torchvision.models.segmentation import FCN_ResNet50_Weights

from cbsa_torch.images import IGNORE, DataError, read_mask_file
from cbsa_torch.images.class_names import ADE20K
from cbsa_torch.images.layouts import (
    open_ade20k,
    open_cityscapes,
    open_image_mask_folders,
    open_pascal_context,
    open_voc,
    voc_pairs,
)
from tests.helpers.pairs import write_image_or_mask as write
from tests.helpers.pairs import write_pairs


def counts(layout):
    return {split: len(pairs) for split, pairs in layout.splits.items()}


def labels(layout, split="train"):
    """Labels in all masks of a split."""
    masks = [layout.labels(read_mask_file(pair.mask)).ravel() for pair in layout.splits[split]]
    return np.unique(np.concatenate(masks)).tolist()


def test_ade20k(tmp_path):
    for long, short in (("training", "train"), ("validation", "val")):
        for i in range(3):
            write(tmp_path / "images" / long / f"ADE_{short}_{i}.jpg")
            write(tmp_path / "annotations" / long / f"ADE_{short}_{i}.png", [0, 1, 150])
    write(tmp_path / "images" / "test" / "ADE_test_0.jpg")
    (tmp_path / "objectInfo150.txt").write_text("not read")
    layout = open_ade20k(tmp_path)
    assert counts(layout) == {"train": 3, "val": 3}
    assert labels(layout) == [IGNORE, 0, 149]
    assert layout.splits["train"][0].mask.name == "ADE_train_0.png"
    assert layout.splits["val"][2].image.name == "ADE_val_2.jpg"
    assert layout.class_names == list(ADE20K)
    assert len(set(ADE20K)) == 150
    # the labels of some, as public lists of the challenge have them
    places = {"wall": 1, "windowpane": 9, "curtain": 19, "stairs": 54, "stairway": 60, "flag": 150}
    assert {name: ADE20K.index(name) + 1 for name in places} == places


def test_voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for i in range(5):
        write(root / "JPEGImages" / f"2007_{i}.jpg")
        write(root / "SegmentationClass" / f"2007_{i}.png", [0, 20, 255])
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_3\n2007_1\n")
    (lists / "trainval.txt").write_text("2007_4")
    (lists / "val.txt").write_text("2007_0\n2007_4\n2007_2\n")
    for given in (root, tmp_path):
        layout = open_voc(given)
        assert [pair.image.stem for pair in layout.splits["train"]] == ["2007_3", "2007_1"]
        assert counts(layout) == {"train": 2, "val": 3}
        assert labels(layout, "val") == [IGNORE, 0, 20]
        assert [pair.mask.stem for pair in voc_pairs(given, "trainval")] == ["2007_4"]
    names = FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"]
    assert layout.class_names == ["background", *names[1:]]
    (lists / "val.txt").write_text("\n")
    with pytest.raises(DataError, match=r"val\.txt names no images"):
        open_voc(root)
    with pytest.raises(
        DataError, match=r"has no vall\.txt; there are train, trainval, val; did you mean 'val'\?"
    ):
        voc_pairs(root, "vall")


@pytest.mark.parametrize(("count", "expected"), [(60, [IGNORE, 0, 1, 59]), (59, [IGNORE, 0, 58])])
def test_pascal_context(tmp_path, count, expected):
    for i in range(2):
        write(tmp_path / "JPEGImages" / f"{i}.jpg")
        write(tmp_path / "SegmentationClassContext" / f"{i}.png", [0, 1, 59, 255])
    lists = tmp_path / "ImageSets" / "SegmentationContext"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0")
    (lists / "val.txt").write_text("1")
    (tmp_path / "classes.txt").write_text("\n".join(f"class {i}" for i in range(count)))
    layout = open_pascal_context(tmp_path, count)
    assert labels(layout) == expected
    assert len(layout.class_names) == count
    with pytest.raises(DataError, match=f"must name {119 - count} classes, got {count}"):
        open_pascal_context(tmp_path, 119 - count)


def test_cityscapes(tmp_path):
    for split, city in (("train", "aachen"), ("train", "ulm"), ("val", "lindau")):
        stem = f"{city}_000000_000019"
        write(tmp_path / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", size=(40, 2))
        write(tmp_path / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png", list(range(34)), (40, 2))
        write(tmp_path / "gtFine" / split / city / f"{stem}_gtFine_instanceIds.png", [99], (40, 2))
    write(tmp_path / "leftImg8bit" / "test" / "berlin" / "b_leftImg8bit.png")
    layout = open_cityscapes(tmp_path)
    assert counts(layout) == {"train": 2, "val": 1}
    known = {c.id: c for c in Cityscapes.classes}
    train_ids = [IGNORE if known[i].train_id == 255 else known[i].train_id for i in range(34)]
    assert layout.labels(np.arange(34)).tolist() == train_ids
    assert read_mask_file(layout.splits["train"][1].mask)[0, :34].tolist() == list(range(34))
    assert layout.class_names == [known[train_ids.index(i)].name for i in range(19)]


def test_splits_around_or_within_the_folders_and_deeper_folders(tmp_path):
    around = open_image_mask_folders(write_pairs(tmp_path / "around"), None)
    assert counts(around) == {"train": 8, "val": 3, "test": 2}
    assert around.class_names == ["sky", "water", "sand"]
    root = tmp_path / "within"
    for kind in ("images", "masks"):
        for split in ("train", "val"):
            target = root / kind / {"train": "train", "val": "validation"}[split]
            target.parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "around" / split / kind).rename(target)
    (root / "classes.txt").write_text("a\nb\nc")
    write(root / "images" / "train" / "deep" / "train_0.webp")
    write(root / "masks" / "train" / "deep" / "train_0.png", [2])
    within = open_image_mask_folders(root, None)
    assert counts(within) == {"train": 9, "val": 3}
    assert [pair.image.name for pair in within.splits["train"][:2]] == ["train_0.webp", "train_0.jpg"]


def test_two_files_of_one_name_are_refused(tmp_path):
    write(write_pairs(tmp_path) / "train" / "images" / "train_0.png")
    with pytest.raises(DataError, match=r"train_0.jpg and .*train_0.png differ in their ending alone"):
        open_image_mask_folders(tmp_path, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n\nb\n", "no class name in line 2"),
        ("a\nb\na", "names 'a' twice"),
        (None, "must name the classes, one a line"),
    ],
)
def test_a_bad_class_list_is_refused(tmp_path, text, message):
    path = write_pairs(tmp_path) / "classes.txt"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(DataError, match=message):
        open_image_mask_folders(tmp_path, None)


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "classes.txt").write_text("a\nb")
    for opened, message in (
        (open_voc, "no train.txt"),
        (open_cityscapes, "no folder leftImg8bit"),
        (open_ade20k, "images is not a folder"),
        (lambda root: open_image_mask_folders(root, None), "neither a folder images nor"),
        (lambda root: open_image_mask_folders(root, 1), "ignore_label must not be .*, got 1, which is 'b'"),
    ):
        with pytest.raises(DataError, match=message):
            opened(tmp_path)
