"""The folders of public data sets, and any pair of image and mask folders: which files belong together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from cbsa_torch._core.checks import nearest
from cbsa_torch.images import class_names
from cbsa_torch.images.errors import DataError
from cbsa_torch.images.folders import (
    ALL_SPLIT_NAMES,
    SPLIT_NAMES,
    Scan,
    find_splits,
    image_files,
    is_hidden,
    split_of,
    visible_folders,
)
from cbsa_torch.images.masks import IGNORE, VOID, LabelMap, consecutive_labels
from cbsa_torch.images.pairs import Pair, pair_folders

CLASSES_FILE = "classes.txt"


class Layout(NamedTuple):
    """What a folder holds."""

    splits: dict[str, list[Pair]]
    """By the names "train", "val" and "test", those that are there."""
    class_names: list[str]
    labels: LabelMap
    notes: Sequence[str] = ()
    """Which folders or lists are which split, and what plays no part and why: a line each."""


def open_ade20k(root: Path) -> Layout:
    """``images/training``, ``annotations/training`` and the same for validation; label 0 is ignored."""
    root = _first_folder(root / "ADEChallengeData2016", root)
    names, scan, images, masks = class_names.ADE20K, Scan(root), root / "images", root / "annotations"
    splits = _split_folders(images, masks, "folders", scan)
    scan.leave_out_others(root, (images, masks), "neither images nor annotations")
    return _layout(splits, names, consecutive_labels(len(names), 1, [0]), scan)


def open_voc(root: Path) -> Layout:
    """``ImageSets/Segmentation/*.txt``, ``JPEGImages`` and ``SegmentationClass``; label 255 is ignored."""
    names, scan = class_names.VOC, Scan(root)
    splits = _listed_splits(*_voc_folders(root), scan)
    return _layout(splits, names, consecutive_labels(len(names), 0, [VOID]), scan)


def voc_pairs(root: Path, split: str) -> list[Pair]:
    """The images of PASCAL VOC that have masks, of any list in ``ImageSets/Segmentation``.

    Raises:
        DataError: no such list, an empty one, or one with a name twice.
    """
    root, lists, masks = _voc_folders(root)
    return _listed(root, masks, _list_file(root, lists, split))


def open_pascal_context(root: Path, count: int) -> Layout:
    """As VOC, the folders named ``...Context`` where there are such; the classes are in ``classes.txt``.

    Args:
        root: folder of ``JPEGImages``.
        count: 60 classes, the first being the background, or 59, label 0 being ignored. 255 always is.
    """
    root = _first_folder(root / "VOCdevkit" / "VOC2010", root / "VOC2010", root)
    names = read_class_names(root)
    if len(names) != count:
        raise DataError(f"{root / CLASSES_FILE} must name {count} classes, got {len(names)}")
    lists = _first_folder(root / "ImageSets" / "SegmentationContext", root / "ImageSets" / "Segmentation")
    masks = _first_folder(root / "SegmentationClassContext", root / "SegmentationClass")
    labels = consecutive_labels(60, 0, [VOID]) if count == 60 else consecutive_labels(59, 1, [0, VOID])
    scan = Scan(root)
    return _layout(_listed_splits(root, lists, masks, scan), names, labels, scan)


def open_cityscapes(root: Path) -> Layout:
    """``leftImg8bit/<split>/<city>`` and ``gtFine/<split>/<city>/*_labelIds.png``: of 34 ids 19 are classes."""
    ids = class_names.CITYSCAPES_IDS
    labels = dict.fromkeys(range(34), IGNORE) | {id_: label for label, id_ in enumerate(ids.values())}
    ends = "_leftImg8bit.png", "_gtFine_labelIds.png"
    images, masks, scan = root / "leftImg8bit", root / "gtFine", Scan(root)
    if not images.is_dir():
        raise DataError(f"{root} has no folder leftImg8bit: is it the folder of Cityscapes?")
    splits = _split_folders(images, masks, "folders", scan, ends)
    scan.leave_out_others(root, (images, masks), "neither leftImg8bit nor gtFine")
    return _layout(splits, ids, LabelMap(labels), scan)


def open_image_mask_folders(
    root: Path, ignore_label: int | None = None, mask_values: Sequence[int] = (), splits: str = "auto"
) -> Layout:
    """Folders ``images`` and ``masks`` with equal names but for the ending, and ``classes.txt``.

    The splits are folders around the two (``train/images``, ``train/masks``) or within them (``images/train``,
    ``masks/train``); without any, all are training images. Line i of ``classes.txt``, from 0, names label i.

    Args:
        root: the folder.
        ignore_label: value of pixels that have no class. Default: none.
        mask_values: the value of each class, in the order of ``classes.txt``. Default: 0, 1, 2 ...
        splits: what folders called "train", "val" ... within ``images`` are: "folders", splits; "none", folders
            like any other; "auto", splits unless there are other folders with images beside them.
    """
    names = read_class_names(root)
    values = list(mask_values) or list(range(len(names)))
    if len(values) != len(names) or len({*values}) < len(values):
        raise DataError(
            f"data.mask_values must be {len(names)} different values, one for each class in "
            f"{root / CLASSES_FILE}, got {values}"
        )
    if ignore_label in values:
        raise DataError(
            f"ignore_label must not be the label of a class, got {ignore_label}, which is "
            f"{names[values.index(ignore_label)]!r} in {root / CLASSES_FILE}"
        )
    ignored = {} if ignore_label is None else {ignore_label: IGNORE}
    labels = LabelMap({**{value: i for i, value in enumerate(values)}, **ignored}, own=True)
    images, masks, scan = root / "images", root / "masks", Scan(root)
    around = {} if splits == "none" else find_splits(root)
    if images.is_dir():
        both = [folder.name for folder in around.values() if (folder / "images").is_dir()]
        if both:
            raise DataError(f"{root} has images and {both[0]}/images: which ones count? Move one of them away")
        scan.leave_out_others(root, (images, masks, root / CLASSES_FILE), "neither images nor masks")
        pairs = _split_folders(images, masks, splits, scan)
    elif around:
        taken = (*around.values(), root / CLASSES_FILE)
        scan.leave_out_others(root, taken, f"not a split ({ALL_SPLIT_NAMES})")
        pairs = {}
        for split, folder in around.items():
            images, masks = folder / "images", folder / "masks"
            if _has_masks(split, folder, masks, scan):
                pairs[split] = pair_folders(images, masks, scan=scan)
                scan.leave_out_others(folder, (images, masks), "neither images nor masks")
    else:
        there = ", ".join(folder.name for folder in visible_folders(root)) or "none"
        raise DataError(f"{root} has neither a folder images nor train/images (its folders: {there})")
    return _layout(pairs, names, labels, scan)


def _layout(splits: dict[str, list[Pair]], names: Iterable[str], labels: LabelMap, scan: Scan) -> Layout:
    """What was found, without test images that have no masks: those of public data sets are kept secret."""
    test, notes = splits.get("test", []), scan.notes()
    if test and not any(pair.mask.exists() for pair in test):
        splits = {split: pairs for split, pairs in splits.items() if split != "test"}
        notes.append(f"left out, the test split: its {len(test)} image(s) have no masks")
    return Layout(splits, list(names), labels, notes)


def read_class_names(root: Path) -> list[str]:
    """The lines of ``classes.txt``."""
    path = root / CLASSES_FILE
    if not path.is_file():
        raise DataError(
            f"there is no {path}, which must name the classes, one a line, in the order of their labels"
        )
    names = _lines(path)
    if "" in names:
        raise DataError(f"{path} has no class name in line {names.index('') + 1}")
    return names


def _lines(path: Path) -> list[str]:
    """The lines of a text file, none of them twice, without space around them and empty lines at the end."""
    if not path.is_file():
        raise DataError(f"{path} is not a file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8: {error}") from error
    # by line breaks alone: names may hold spaces
    lines = [line.strip() for line in text.rstrip().split("\n")]
    seen: set[str] = set()
    for line in lines:
        if line and line in seen:
            raise DataError(f"{path} names {line!r} twice")
        seen.add(line)
    return lines


def _voc_folders(root: Path) -> tuple[Path, Path, Path]:
    """The folder of ``JPEGImages``, that of the lists, that of the masks."""
    root = _first_folder(root / "VOCdevkit" / "VOC2012", root / "VOC2012", root)
    return root, root / "ImageSets" / "Segmentation", root / "SegmentationClass"


def _listed_splits(root: Path, lists: Path, masks: Path, scan: Scan) -> dict[str, list[Pair]]:
    """The splits that have a list."""
    files: dict[str, Path] = {}
    for path in sorted(lists.iterdir()) if lists.is_dir() else []:
        split = split_of(path.stem) if path.suffix.lower() == ".txt" else None
        if split is None:
            hidden, why = is_hidden(path.name), f"not the list of a split ({ALL_SPLIT_NAMES}, and .txt)"
            scan.leave_out(path, "hidden" if hidden else why)
        elif split in files:
            raise DataError(
                f"{lists} has {files[split].name} and {path.name}: which one lists the {split} split?"
            )
        else:
            files[split] = path
            scan.take(split, path)
    if "train" not in files:
        files["train"] = _list_file(root, lists, "train")
    found: dict[str, list[Pair]] = {}
    first: dict[str, tuple[str, Path]] = {}  # by the real path, where it was read before
    for split in SPLIT_NAMES:
        if split in files:
            found[split] = _listed(root, masks, files[split])
            for image, _ in found[split]:
                other = first.setdefault(os.path.realpath(image), (split, image))
                if other[1] != image:
                    raise DataError(f"{other[1]} and {image} are one image, by a link: list one of them")
                if other[0] != split:
                    raise DataError(f"{image.stem!r} is in the lists of both {other[0]} and {split}")
    used = (root / "JPEGImages", masks, lists, lists.parent, root / CLASSES_FILE)
    scan.leave_out_others(root, used, "neither images, masks nor lists")
    return found


def _list_file(root: Path, lists: Path, name: str) -> Path:
    """``<lists>/<name>.txt``, which must be there."""
    path = lists / f"{name}.txt"
    if not path.is_file():
        there = sorted(found.stem for found in lists.glob("*.txt"))
        known = f"; there are {', '.join(there)}{nearest(name, there)}" if there else ""
        raise DataError(f"{lists} has no {path.name}{known}: is {root} the folder that holds JPEGImages?")
    return path


def _listed(root: Path, masks: Path, path: Path) -> list[Pair]:
    """The pairs whose names a file lists, one a line: ``JPEGImages/NAME.jpg`` and ``<masks>/NAME.png``."""
    names = [name for name in _lines(path) if name]
    if not names:
        raise DataError(f"{path} names no images")
    return [Pair(root / "JPEGImages" / f"{name}.jpg", masks / f"{name}.png") for name in names]


def _first_folder(*folders: Path) -> Path:
    return next((folder for folder in folders if folder.is_dir()), folders[-1])


def _split_folders(
    images: Path, masks: Path, splits: str, scan: Scan, ends: tuple[str, str] | None = None
) -> dict[str, list[Pair]]:
    """Splits as folders within both; without any, the two are the training split."""
    found = {} if splits == "none" else find_splits(images)
    if not found:
        scan.take("train", images)
        return {"train": pair_folders(images, masks, ends, scan)}
    others = [folder for folder in visible_folders(images) if folder not in found.values()]
    if splits == "auto" and any(image_files(folder) for folder in others):
        raise DataError(
            f"{images} has {', '.join(folder.name for folder in found.values())}, called like splits, beside "
            f"other folders with images ({', '.join(folder.name for folder in others)}): set data.splits to "
            "folders to leave those out, or to none if there are no splits"
        )
    masks_found = find_splits(masks)
    for split, folder in masks_found.items():
        if split not in found:
            raise DataError(
                f"{folder} is the {split} split of the masks, and {images} has none: add it, or move that away"
            )
    for folder, taken in ((images, found), (masks, masks_found)):
        scan.leave_out_others(folder, taken.values(), f"not a split ({ALL_SPLIT_NAMES})")
    pairs = {}
    for split, folder in found.items():
        mask_folder = masks_found.get(split, masks / folder.name)
        if _has_masks(split, folder, mask_folder, scan):
            pairs[split] = pair_folders(folder, mask_folder, ends, scan)
    return pairs


def _has_masks(split: str, folder: Path, masks: Path, scan: Scan) -> bool:
    """Whether a split can be used: public data sets have test images without masks."""
    if split == "test" and not masks.is_dir():
        scan.leave_out(folder, f"test images without masks ({masks} is not there)")
        return False
    scan.take(split, folder)
    return True
