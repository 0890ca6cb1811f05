"""Image folders: ROOT/<split>/<class>/<image>."""

from __future__ import annotations

from pathlib import Path

from timm.data import ImageDataset

from cbsa_torch._core.checks import nearest
from cbsa_torch.train.data.images import CheckedImages, SkippedImages
from cbsa_torch.train.errors import DataError

SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test",)}

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Files that are taken for images, in small or capital letters; timm's own list ends after the third."""


def find_split(root: Path, split: str) -> Path | None:
    """The folder of a split, under one of its usual names."""
    return next((root / name for name in SPLIT_NAMES[split] if (root / name).is_dir()), None)


def find_splits(root: Path) -> dict[str, Path]:
    """The folders of all splits there are; ROOT itself is the training split if it has class folders."""
    if not root.is_dir():
        raise DataError(f"data.root {root} is not a folder")
    found = {split: folder for split in SPLIT_NAMES if (folder := find_split(root, split))}
    if "train" not in found and found:
        raise DataError(f"{root} has a {next(iter(found))} folder but no train folder")
    return found or {"train": root}


def class_folders(folder: Path) -> list[str]:
    """The classes of a split: its folders, sorted."""
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise DataError(
            f"{folder} has no class folders: images must lie in one folder per class, "
            f"e.g. {folder / 'cat' / 'photo.jpg'}"
        )
    return names


def open_folder(folder: Path, class_names: list[str], mode: str, skipped: SkippedImages) -> CheckedImages:
    """The images of one split; a class's label is its place in ``class_names``."""
    strange = [name for name in class_folders(folder) if name not in class_names]
    if strange:
        raise DataError(
            f"{folder} has a class {strange[0]!r} that the training images have not"
            f"{nearest(strange[0], class_names)}"
        )
    try:
        images = ImageDataset(str(folder), reader="", input_key=";".join(EXTENSIONS), input_img_mode=mode)
    except RuntimeError as error:
        raise DataError(f"no images found in {folder}: {error}") from error
    # timm labels an image by the folder it lies in, however deep
    found: dict[str, int] = images.reader.class_to_idx
    misplaced = [name for name in found if name not in class_names]
    if misplaced:
        raise DataError(
            f"{folder} has images that do not lie directly in a class folder, e.g. in {misplaced[0]!r}"
            if misplaced[0]
            else f"{folder} has images without a class, beside the class folders"
        )
    relabel = {label: class_names.index(name) for name, label in found.items()}
    return CheckedImages(images, mode, skipped, relabel)
