"""Folders of images: names of splits, classes as folders, and which files are images.

``ROOT/<split>/<class>/<image>`` holds images by class; :mod:`.layouts` reads folders of images and masks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from cbsa_torch._core.checks import nearest
from cbsa_torch.images.errors import DataError

SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test",)}
"""The splits, and the names that their folders may have."""

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Names of image files end in one of these, in small or capital letters."""


def find_splits(root: Path) -> dict[str, Path]:
    """The folders of the splits that are there, by the names "train", "val" and "test"; there may be none.

    Raises:
        DataError: ``root`` is not a folder.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    there = {
        split: [root / name for name in names if (root / name).is_dir()] for split, names in SPLIT_NAMES.items()
    }
    return {split: folders[0] for split, folders in there.items() if folders}


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder and in those below it, sorted by name, numbers in names by their value.

    Links are followed. Hidden files and folders, whose names begin with a dot, are passed over.

    Raises:
        DataError: ``folder`` is not a folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    found: list[Path] = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        images = (name for name in files if name.lower().endswith(EXTENSIONS) and not _is_hidden(name))
        found += [Path(parent, name) for name in images]
    return sorted(found, key=_natural_order)


def class_folders(folder: Path) -> list[str]:
    """The classes of a split: the names of its folders, sorted.

    Raises:
        DataError: there are none.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not _is_hidden(path.name))
    if not names:
        raise DataError(
            f"{folder} has no class folders: images must lie in one folder per class, "
            f"e.g. {folder / 'cat' / 'photo.jpg'}"
        )
    return names


def class_samples(folder: Path, class_names: Sequence[str]) -> list[tuple[Path, int]]:
    """The images of a split with their labels; a class's label is its place in ``class_names``.

    Raises:
        DataError: no images, a class that is not in ``class_names``, or images that are not in a class folder.
    """
    strange = [name for name in class_folders(folder) if name not in class_names]
    if strange:
        raise DataError(
            f"{folder} has a class {strange[0]!r} that the training images have not"
            f"{nearest(strange[0], class_names)}"
        )
    labels = {name: label for label, name in enumerate(class_names)}
    samples = []
    for path in image_files(folder):
        if path.parent == folder:
            raise DataError(f"{folder} has images without a class, beside the class folders, e.g. {path.name}")
        if path.parent.name not in labels:
            raise DataError(
                f"{folder} has images that do not lie directly in a class folder, e.g. in {path.parent.name!r}"
            )
        samples.append((path, labels[path.parent.name]))
    if not samples:
        raise DataError(f"no images found in {folder}; names of images end in {', '.join(EXTENSIONS)}")
    return samples


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _natural_order(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", str(path).lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(path)
