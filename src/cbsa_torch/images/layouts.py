"""The folders of public data sets, and any pair of image and mask folders: which files belong together."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from cbsa_torch._core.checks import nearest
from cbsa_torch.images import class_names
from cbsa_torch.images.errors import DataError
from cbsa_torch.images.folders import SPLIT_NAMES, find_splits
from cbsa_torch.images.masks import IGNORE, VOID, LabelMap, consecutive_labels
from cbsa_torch.images.pairs import Pair, pair_folders

CLASSES_FILE = "classes.txt"


class Layout(NamedTuple):
    """What a folder holds."""

    splits: dict[str, list[Pair]]
    """By the names "train", "val" and "test", those that are there."""
    class_names: list[str]
    labels: LabelMap


def open_ade20k(root: Path) -> Layout:
    """``images/training``, ``annotations/training`` and the same for validation; label 0 is ignored."""
    root = _first_folder(root / "ADEChallengeData2016", root)
    names = class_names.ADE20K
    splits = _split_folders(root / "images", root / "annotations")
    return Layout(splits, list(names), consecutive_labels(len(names), 1, [0]))


def open_voc(root: Path) -> Layout:
    """``ImageSets/Segmentation/*.txt``, ``JPEGImages`` and ``SegmentationClass``; label 255 is ignored."""
    names = class_names.VOC
    return Layout(_listed_splits(*_voc_folders(root)), list(names), consecutive_labels(len(names), 0, [VOID]))


def voc_pairs(root: Path, split: str) -> list[Pair]:
    """The images of PASCAL VOC that have masks, of any list in ``ImageSets/Segmentation``.

    Raises:
        DataError: no such list, or an empty one.
    """
    return _listed(*_voc_folders(root), split)


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
    return Layout(_listed_splits(root, lists, masks), names, labels)


def open_cityscapes(root: Path) -> Layout:
    """``leftImg8bit/<split>/<city>`` and ``gtFine/<split>/<city>/*_labelIds.png``: of 34 ids 19 are classes."""
    ids = class_names.CITYSCAPES_IDS
    labels = dict.fromkeys(range(34), IGNORE) | {id_: label for label, id_ in enumerate(ids.values())}
    ends = "_leftImg8bit.png", "_gtFine_labelIds.png"
    splits = {}
    for split in SPLIT_NAMES:
        images, masks = root / "leftImg8bit" / split, root / "gtFine" / split
        if images.is_dir() and (split != "test" or masks.is_dir()):
            splits[split] = pair_folders(images, masks, ends)
    if not splits:
        raise DataError(f"{root} has no leftImg8bit/train: is it the folder of Cityscapes?")
    return Layout(splits, list(ids), LabelMap(labels))


def open_image_mask_folders(root: Path, ignore_label: int | None) -> Layout:
    """Folders ``images`` and ``masks`` with equal names but for the ending, and ``classes.txt``.

    The splits are folders around the two (``train/images``, ``train/masks``) or within them (``images/train``,
    ``masks/train``); without any, all are training images. Line i of ``classes.txt``, from 0, names label i.

    Args:
        root: the folder.
        ignore_label: value of pixels that have no class. Default: none.
    """
    names = read_class_names(root)
    if ignore_label is not None and ignore_label < len(names):
        raise DataError(
            f"ignore_label must not be the label of a class, got {ignore_label}, which is "
            f"{names[ignore_label]!r} in {root / CLASSES_FILE}"
        )
    labels = consecutive_labels(len(names), 0, [] if ignore_label is None else [ignore_label])
    if (root / "images").is_dir():
        return Layout(_split_folders(root / "images", root / "masks"), names, labels)
    splits = {
        split: pair_folders(folder / "images", folder / "masks") for split, folder in find_splits(root).items()
    }
    if not splits:
        raise DataError(f"{root} has neither a folder images nor train/images")
    return Layout(splits, names, labels)


def read_class_names(root: Path) -> list[str]:
    """The lines of ``classes.txt``."""
    path = root / CLASSES_FILE
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except OSError as error:
        raise DataError(
            f"cannot read {path}, which must name the classes, one a line, in the order of their labels: "
            f"{error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8: {error}") from error
    if "" in names:
        raise DataError(f"{path} has no class name in line {names.index('') + 1}")
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise DataError(f"{path} names {twice[0]!r} twice")
    return names


def _voc_folders(root: Path) -> tuple[Path, Path, Path]:
    """The folder of ``JPEGImages``, that of the lists, that of the masks."""
    root = _first_folder(root / "VOCdevkit" / "VOC2012", root / "VOC2012", root)
    return root, root / "ImageSets" / "Segmentation", root / "SegmentationClass"


def _listed_splits(root: Path, lists: Path, masks: Path) -> dict[str, list[Pair]]:
    """The splits that have a list."""
    there = [split for split in SPLIT_NAMES if (lists / f"{split}.txt").is_file()] or ["train"]
    return {split: _listed(root, lists, masks, split) for split in there}


def _listed(root: Path, lists: Path, masks: Path, split: str) -> list[Pair]:
    """The pairs that ``<lists>/<split>.txt`` names: ``JPEGImages/NAME.jpg`` and ``<masks>/NAME.png``."""
    path = lists / f"{split}.txt"
    if not path.is_file():
        there = sorted(found.stem for found in lists.glob("*.txt"))
        known = f"; there are {', '.join(there)}{nearest(split, there)}" if there else ""
        raise DataError(f"{lists} has no {path.name}{known}: is {root} the folder that holds JPEGImages?")
    names = path.read_text(encoding="utf-8").split()
    if not names:
        raise DataError(f"{path} names no images")
    return [Pair(root / "JPEGImages" / f"{name}.jpg", masks / f"{name}.png") for name in names]


def _first_folder(*folders: Path) -> Path:
    return next((folder for folder in folders if folder.is_dir()), folders[-1])


def _split_folders(images: Path, masks: Path) -> dict[str, list[Pair]]:
    """Splits as folders within both; without any, the two are the training split."""
    found = find_splits(images)
    if not found:
        return {"train": pair_folders(images, masks)}
    # ADE20K has test images without masks
    has_masks = {split: f for split, f in found.items() if split != "test" or (masks / f.name).is_dir()}
    return {split: pair_folders(f, masks / f.name) for split, f in has_masks.items()}
