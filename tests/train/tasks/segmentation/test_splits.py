"""The folders of public data sets and of anyone's pairs; bad masks are left out, counted and listed."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.models.segmentation import FCN_ResNet50_Weights

from cbsa_torch.train.data import read_skipped
from cbsa_torch.train.errors import ConfigError, DataError
from cbsa_torch.train.tasks.segmentation import (
    IGNORE,
    SegmentationDataConfig,
    evaluation_transform,
    open_segmentation,
    open_segmentation_split,
)
from cbsa_torch.images.class_names import ADE20K

SIZE = (8, 6)


def write(path, values=None, size=SIZE):
    """An image, or a mask whose first row holds values and whose rest the first of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if values is None:
        pixels = np.random.default_rng(len(path.name)).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    else:
        pixels = np.full(size[::-1], values[0], dtype=np.uint8)
        pixels[0, : len(values)] = values
    Image.fromarray(pixels).save(path)


def config(root, name="folder", **changes):
    return SegmentationDataConfig(name=name, root=str(root), workers=0, **changes)


def found(dataset):
    """Labels in all masks."""
    return np.unique(
        np.concatenate([mask.ravel() for _, mask in (dataset[i] for i in range(len(dataset)))])
    ).tolist()


@pytest.fixture
def pairs(tmp_path):
    """Eight training, three validation, two test pairs of three classes."""
    root = tmp_path / "data"
    for split, count in (("train", 8), ("val", 3), ("test", 2)):
        for i in range(count):
            write(root / split / "images" / f"{split}_{i}.jpg")
            write(root / split / "masks" / f"{split}_{i}.png", [0, 1, 2])
    (root / "classes.txt").write_text("sky\nwater\nsand\n")
    return root


def test_ade20k(tmp_path):
    for long, short in (("training", "train"), ("validation", "val")):
        for i in range(3):
            write(tmp_path / "images" / long / f"ADE_{short}_{i}.jpg")
            write(tmp_path / "annotations" / long / f"ADE_{short}_{i}.png", [0, 1, 150])
    write(tmp_path / "images" / "test" / "ADE_test_0.jpg")
    (tmp_path / "objectInfo150.txt").write_text("not read")
    splits = open_segmentation(config(tmp_path, "ade20k"))
    assert [len(splits.train), len(splits.val), splits.test] == [3, 3, None]
    assert found(splits.train) == [IGNORE, 0, 149]
    assert splits.class_names == list(ADE20K)
    assert splits.train.pairs[0].mask.name == "ADE_train_0.png"
    assert splits.val.pairs[2].image.name == "ADE_val_2.jpg"


def test_ade20k_has_150_different_classes():
    assert len(set(ADE20K)) == 150
    # the labels of some, as public lists of the challenge have them
    places = {
        "wall": 1,
        "windowpane": 9,
        "curtain": 19,
        "stairs": 54,
        "stairway": 60,
        "crt screen": 142,
        "flag": 150,
    }
    assert {name: ADE20K.index(name) + 1 for name in places} == places


def test_voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for i in range(5):
        write(root / "JPEGImages" / f"2007_{i}.jpg")
        write(root / "SegmentationClass" / f"2007_{i}.png", [0, 20, 255])
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_3\n2007_1\n")
    (lists / "val.txt").write_text("2007_0\n2007_4\n2007_2\n")
    for given in (root, tmp_path):
        splits = open_segmentation(config(given, "voc"))
        assert [pair.image.stem for pair in splits.train.pairs] == ["2007_3", "2007_1"]
        assert len(splits.val) == 3
        assert found(splits.val) == [IGNORE, 0, 20]
    names = FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"]
    assert splits.class_names == ["background", *names[1:]]


@pytest.mark.parametrize(
    ("name", "count", "labels"), [("", 60, [IGNORE, 0, 1, 59]), ("_59", 59, [IGNORE, 0, 58])]
)
def test_pascal_context(tmp_path, name, count, labels):
    for i in range(2):
        write(tmp_path / "JPEGImages" / f"{i}.jpg")
        write(tmp_path / "SegmentationClassContext" / f"{i}.png", [0, 1, 59, 255])
    lists = tmp_path / "ImageSets" / "SegmentationContext"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0")
    (lists / "val.txt").write_text("1")
    (tmp_path / "classes.txt").write_text("\n".join(f"class {i}" for i in range(count)))
    splits = open_segmentation(config(tmp_path, f"pascal_context{name}"))
    assert found(splits.train) == labels
    assert len(splits.class_names) == count
    with pytest.raises(DataError, match=f"must name {119 - count} classes, got {count}"):
        open_segmentation(config(tmp_path, "pascal_context" if name else "pascal_context_59"))


# id: train id, from the public table of cityscapesScripts; all others are ignored
TRAIN_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
TRAIN_IDS |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}


def test_cityscapes(tmp_path):
    for split, city in (("train", "aachen"), ("train", "ulm"), ("val", "lindau")):
        stem = f"{city}_000000_000019"
        write(tmp_path / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", size=(40, 2))
        write(tmp_path / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png", list(range(34)), (40, 2))
        write(tmp_path / "gtFine" / split / city / f"{stem}_gtFine_instanceIds.png", [99], (40, 2))
    write(tmp_path / "leftImg8bit" / "test" / "berlin" / "b_leftImg8bit.png")
    splits = open_segmentation(config(tmp_path, "cityscapes"))
    assert [len(splits.train), len(splits.val), splits.test] == [2, 1, None]
    assert splits.train[1][1][0, :34].tolist() == [TRAIN_IDS.get(i, IGNORE) for i in range(34)]
    assert len(splits.class_names) == 19
    assert splits.class_names[:2] + splits.class_names[-2:] == ["road", "sidewalk", "motorcycle", "bicycle"]


def test_pairs_in_split_folders(pairs):
    splits = open_segmentation(config(pairs))
    assert [len(s) for s in splits[:3]] == [8, 3, 2]
    assert splits.class_names == ["sky", "water", "sand"]
    image, mask = splits.train[0]
    assert image.size == SIZE
    assert mask.shape == SIZE[::-1]
    assert mask.dtype == np.int64
    assert mask[0, :4].tolist() == [0, 1, 2, 0]


def test_splits_within_the_folders_and_deeper_folders(pairs):
    root = pairs.parent / "other"
    for kind in ("images", "masks"):
        for split in ("train", "validation"):
            (root / kind / split).parent.mkdir(parents=True, exist_ok=True)
            (pairs / split[:5].replace("valid", "val") / kind).rename(root / kind / split)
    (root / "classes.txt").write_text("a\nb\nc")
    write(root / "images" / "train" / "deep" / "train_0.webp")
    write(root / "masks" / "train" / "deep" / "train_0.png", [2])
    splits = open_segmentation(config(root))
    assert [len(splits.train), len(splits.val), splits.test] == [9, 3, None]


def test_without_splits_some_are_held_out_the_same_ones_always(pairs):
    (pairs / "classes.txt").rename(pairs / "train" / "classes.txt")
    first, second = (open_segmentation(config(pairs / "train", val_fraction=0.25)) for _ in range(2))
    assert [len(first.train), len(first.val)] == [6, 2]
    assert first.val.pairs == second.val.pairs
    assert not {*first.train.pairs} & {*first.val.pairs}


def test_one_split_needs_no_other(pairs):
    names = ["sky", "water", "sand"]
    for split in ("train", "val"):
        (pairs / split).rename(pairs.parent / split)
    assert len(open_segmentation_split(config(pairs), "RGB", "test", names)) == 2
    with pytest.raises(
        DataError, match=r"the data's 3 classes \(sky, water, sand, \.\.\.\) are not the model's 2"
    ):
        open_segmentation_split(config(pairs), "RGB", "test", ["sky", "water"])
    with pytest.raises(DataError, match="has a test split but no train split"):
        open_segmentation_split(config(pairs), "RGB", "val", names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n\nb\n", "no class name in line 2"),
        ("a\nb\na", "names 'a' twice"),
        (None, "must name the classes, one a line"),
    ],
)
def test_a_bad_class_list_is_refused(pairs, text, message):
    path = pairs / "classes.txt"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(DataError, match=message):
        open_segmentation(config(pairs))


def test_settings_that_cannot_work_are_refused(pairs, tmp_path):
    with pytest.raises(ConfigError, match=r"ignore_label must not be .*, got 1, which is 'water'"):
        open_segmentation(config(pairs, ignore_label=1))
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
    with pytest.raises(DataError, match="neither a folder images nor"):
        (tmp_path / "classes.txt").write_text("a")
        open_segmentation(config(tmp_path))
    for name, part in (
        ("voc", "no train.txt"),
        ("cityscapes", "no leftImg8bit"),
        ("ade20k", "images is not a"),
    ):
        with pytest.raises(DataError, match=part):
            open_segmentation(config(tmp_path, name))


def test_hidden_folders_hold_no_images(pairs):
    before = len(open_segmentation(config(pairs)).train)
    write(pairs / "train" / "images" / ".checkpoints" / "train_0.jpg")
    assert len(open_segmentation(config(pairs)).train) == before


def test_two_files_of_one_name_are_refused(pairs):
    write(pairs / "train" / "images" / "train_0.png")
    with pytest.raises(DataError, match=r"train_0.jpg and .*train_0.png differ in their ending alone"):
        open_segmentation(config(pairs))


# ---- bad masks


def rgb(folder):
    write(folder / "masks" / "train_3.png")


def wrong_size(folder):
    write(folder / "masks" / "train_3.png", [0], (6, 8))


def unknown_label(folder):
    write(folder / "masks" / "train_3.png", [0, 7, 7])


def void(folder):
    write(folder / "masks" / "train_3.png", [255])


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
    write(pairs / "train" / "masks" / "train_5.png", [9])
    data = open_segmentation(config(pairs, max_bad_images=1), skipped=tmp_path / "s.txt").train
    with pytest.raises(DataError, match=r"train_5.png: unknown label 9 .*max_bad_images is 1"):
        [data[i] for i in range(8)]


def test_the_ignore_label_is_ignored(pairs):
    void(pairs / "train")
    data = open_segmentation(config(pairs, ignore_label=255, max_bad_images=0)).train
    assert np.unique(data[3][1]).tolist() == [IGNORE]
