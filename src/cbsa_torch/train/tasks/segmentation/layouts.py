"""The folders of public data sets, and any pair of image and mask folders: which files belong together."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torchvision.datasets import Cityscapes

from cbsa_torch.train.data.folder import EXTENSIONS, SPLIT_NAMES, find_split
from cbsa_torch.train.data.images import IGNORE
from cbsa_torch.train.errors import ConfigError, DataError
from cbsa_torch.train.tasks.segmentation import class_names
from cbsa_torch.train.tasks.segmentation.masks import LabelMap, shifted
from cbsa_torch.train.tasks.segmentation.pairs import Pair

VOID = 255
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
    return Layout(splits, list(names), shifted(len(names), 1, [0]))


def open_voc(root: Path) -> Layout:
    """``ImageSets/Segmentation/*.txt``, ``JPEGImages`` and ``SegmentationClass``; label 255 is ignored."""
    root = _first_folder(root / "VOCdevkit" / "VOC2012", root / "VOC2012", root)
    names = class_names.VOC
    splits = _listed(root, root / "ImageSets" / "Segmentation", root / "SegmentationClass")
    return Layout(splits, list(names), shifted(len(names), 0, [VOID]))


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
    labels = shifted(60, 0, [VOID]) if count == 60 else shifted(59, 1, [0, VOID])
    return Layout(_listed(root, lists, masks), names, labels)


def open_cityscapes(root: Path) -> Layout:
    """``leftImg8bit/<split>/<city>`` and ``gtFine/<split>/<city>/*_labelIds.png``: of 34 ids 19 are classes."""
    known = [c for c in Cityscapes.classes if c.id >= 0]
    classes = sorted((c for c in known if c.train_id != VOID), key=lambda c: c.train_id)
    labels = LabelMap({c.id: IGNORE if c.train_id == VOID else c.train_id for c in known})
    ends = "_leftImg8bit.png", "_gtFine_labelIds.png"
    splits = {}
    for split in SPLIT_NAMES:
        images, masks = root / "leftImg8bit" / split, root / "gtFine" / split
        if images.is_dir() and (split != "test" or masks.is_dir()):
            paired = _pair(_by_key(images, ends[0]), _by_key(masks, ends[1]), images, masks, ends)
            splits[split] = _not_empty(paired, images)
    if not splits:
        raise DataError(f"{root} has no leftImg8bit/train: is it the folder of Cityscapes?")
    return Layout(splits, [c.name for c in classes], labels)


def open_pairs(root: Path, ignore_label: int | None) -> Layout:
    """Folders ``images`` and ``masks`` with equal names but for the ending, and ``classes.txt``.

    The splits are folders around the two (``train/images``, ``train/masks``) or within them (``images/train``,
    ``masks/train``); without any, all are training images. Line i of ``classes.txt``, from 0, names label i.

    Args:
        root: the folder.
        ignore_label: value of pixels that have no class. Default: none.
    """
    names = read_class_names(root)
    if ignore_label is not None and ignore_label < len(names):
        raise ConfigError(
            f"data.ignore_label must not be the label of a class, got {ignore_label}, which is "
            f"{names[ignore_label]!r} in {root / CLASSES_FILE}"
        )
    labels = shifted(len(names), 0, [] if ignore_label is None else [ignore_label])
    if (root / "images").is_dir():
        return Layout(_split_folders(root / "images", root / "masks"), names, labels)
    splits = {
        split: _folder_pairs(folder / "images", folder / "masks")
        for split in SPLIT_NAMES
        if (folder := find_split(root, split))
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


def _first_folder(*folders: Path) -> Path:
    return next((folder for folder in folders if folder.is_dir()), folders[-1])


def _split_folders(images: Path, masks: Path) -> dict[str, list[Pair]]:
    """Splits as folders within both; without any, the two are the training split."""
    if not images.is_dir():
        raise DataError(f"{images} is not a folder")
    found = {split: folder for split in SPLIT_NAMES if (folder := find_split(images, split))}
    if not found:
        return {"train": _folder_pairs(images, masks)}
    # ADE20K has test images without masks
    has_masks = {split: f for split, f in found.items() if split != "test" or (masks / f.name).is_dir()}
    return {split: _folder_pairs(f, masks / f.name) for split, f in has_masks.items()}


def _folder_pairs(images: Path, masks: Path) -> list[Pair]:
    return _not_empty(_pair(_by_key(images), _by_key(masks), images, masks, (".jpg", ".png")), images)


def _pair(
    images: dict[str, Path],
    masks: dict[str, Path],
    image_folder: Path,
    mask_folder: Path,
    ends: tuple[str, str],
) -> list[Pair]:
    """Images and masks of the same key; of one without the other, the name that the other would have."""
    return [
        Pair(images.get(key, image_folder / f"{key}{ends[0]}"), masks.get(key, mask_folder / f"{key}{ends[1]}"))
        for key in sorted({*images, *masks})
    ]


def _by_key(folder: Path, end: str | None = None) -> dict[str, Path]:
    """Image files, however deep, by their path within the folder without the ending."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.name.endswith(end or ""):
            continue
        if end is None and path.suffix.lower() not in EXTENSIONS:
            continue
        key = path.relative_to(folder).as_posix().removesuffix(end or path.suffix)
        if key in found:
            raise DataError(f"{found[key]} and {path} differ in their ending alone: which one counts?")
        found[key] = path
    return found


def _listed(root: Path, lists: Path, masks: Path) -> dict[str, list[Pair]]:
    """The pairs named in ``train.txt``, ``val.txt`` and ``test.txt``; those that are missing show when read."""
    splits = {}
    for split in SPLIT_NAMES:
        path = lists / f"{split}.txt"
        if path.is_file():
            names = path.read_text(encoding="utf-8").split()
            pairs = [Pair(root / "JPEGImages" / f"{name}.jpg", masks / f"{name}.png") for name in names]
            splits[split] = _not_empty(pairs, path)
    if not splits:
        raise DataError(f"{lists} has no train.txt: is {root} the folder that holds JPEGImages?")
    return splits


def _not_empty(pairs: list[Pair], where: Path) -> list[Pair]:
    if not pairs:
        raise DataError(f"no images found in {where}")
    return pairs
