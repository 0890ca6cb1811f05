"""Images with segmentation masks, read from folders: two folders of files, or the layout of PASCAL VOC."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from cbsa_torch._core.checks import nearest

Transform = Callable[[Image.Image], Tensor]
"""Makes of an RGB picture what the model wants, ``(C, height, width)``; it must show the whole picture."""

VOID = 255
"""Palette index of pixels that belong to nothing: PASCAL VOC draws it around objects."""
READ_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What PIL raises at files that are damaged or too large (the training data's readers catch the same)."""
_INDEX_MODES = ("1", "L", "P", "I", "I;16")


class SegmentedImage(NamedTuple):
    """An image for the model, and which of its pixels are foreground."""

    image: Tensor
    """``(C, height, width)`` as the model wants it."""
    mask: Tensor
    """``(height, width)`` bool, True = foreground."""
    valid: Tensor | None = None
    """``(height, width)`` bool, False = void: not counted. None: every pixel counts."""


class ImagePairs:
    """Pairs of an image file and a mask file, read when asked for. Has a length, and can be iterated again.

    Raises:
        ValueError: at iteration, a file that is no picture, or a mask of another size than its image, or not
            of one channel; TypeError: a transform that returns no tensor.
    """

    def __init__(self, files: Sequence[tuple[Path, Path]], transform: Transform) -> None:
        if not callable(transform):
            raise TypeError(f"transform must be a function of a PIL image, got {type(transform).__name__}")
        self.files = list(files)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[SegmentedImage]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> SegmentedImage:
        image_file, mask_file = self.files[index]
        picture, drawn = _open(image_file), _open(mask_file)
        if picture.size != drawn.size:
            raise ValueError(
                f"mask {mask_file} is {_size(drawn)}, but its image {image_file} is {_size(picture)}; "
                "they must be of one size"
            )
        if drawn.mode not in _INDEX_MODES:
            raise ValueError(
                f"mask {mask_file} must have one channel (modes {', '.join(_INDEX_MODES)}: 0 = background), "
                f"got mode {drawn.mode}"
            )
        index_map = torch.from_numpy(np.array(drawn).astype(np.int64))
        image = self.transform(picture.convert("RGB"))
        if not isinstance(image, Tensor):
            raise TypeError(f"transform must return a torch.Tensor, got {type(image).__name__}")
        valid = index_map != VOID if drawn.mode == "P" else None
        mask = (index_map != 0) if valid is None else (index_map != 0) & valid
        return SegmentedImage(image, mask, valid)


def read_pairs(images: str | Path, masks: str | Path, transform: Transform) -> ImagePairs:
    """Pair the files of two folders by name: ``cat.jpg`` with ``cat.png``.

    Masks have one channel and the size of their image; 0 is background and all else foreground. In masks
    with a palette, as PASCAL VOC has them, 255 is void and not counted; in others it is foreground.

    Args:
        images, masks: the folders. Files whose names begin with a dot are passed over.
        transform: makes of an RGB ``PIL.Image`` the ``(C, height, width)`` tensor that the model wants. It may
            resize, but must not crop or flip: the mask stays as the file has it.

    Returns:
        Something to iterate over, for :func:`zero_shot_iou` (with ``resized=True`` if ``transform``
        resizes).

    Raises:
        ValueError: a folder that is not there or empty, or files without a partner.
    """
    image_files, mask_files = _files(Path(images), "images"), _files(Path(masks), "masks")
    for missing, kind, folder in (
        (sorted(image_files.keys() - mask_files.keys()), "mask", masks),
        (sorted(mask_files.keys() - image_files.keys()), "image", images),
    ):
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"no {kind} in {folder} for {missing[0]!r}{more}")
    return ImagePairs([(image_files[name], mask_files[name]) for name in sorted(image_files)], transform)


def read_voc(root: str | Path, transform: Transform, split: str = "val") -> ImagePairs:
    """The segmented images of a split of PASCAL VOC: any object is foreground, palette index 255 void.

    Args:
        root: the folder with JPEGImages, SegmentationClass and ImageSets (``VOCdevkit/VOC2012``).
        transform: as for :func:`read_pairs`.
        split: a list in ImageSets/Segmentation, without ``.txt``.

    Raises:
        ValueError: no such folder, list or file, or an empty list.
    """
    root = Path(root)
    lists = root / "ImageSets" / "Segmentation"
    for folder in (root / "JPEGImages", root / "SegmentationClass", lists):
        if not folder.is_dir():
            raise ValueError(f"root {root} must have a folder {folder.relative_to(root)}, as PASCAL VOC has")
    chosen = lists / f"{split}.txt"
    if not chosen.is_file():
        there = sorted(path.stem for path in lists.glob("*.txt"))
        raise ValueError(f"split must be one of {', '.join(there)}, got {split!r}{nearest(split, there)}")
    names = chosen.read_text(encoding="utf-8").split()
    if not names:
        raise ValueError(f"{chosen} names no images")
    pairs = [(root / "JPEGImages" / f"{n}.jpg", root / "SegmentationClass" / f"{n}.png") for n in names]
    for path in (path for pair in pairs for path in pair):
        if not path.is_file():
            raise ValueError(f"{chosen} names an image that is not there: {path}")
    return ImagePairs(pairs, transform)


def _files(folder: Path, name: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{name} must be a folder, got {folder}")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.stem in found:
            raise ValueError(f"{name}: {found[path.stem].name} and {path.name} in {folder} have one name")
        found[path.stem] = path
    if not found:
        raise ValueError(f"{name}: the folder {folder} is empty")
    return found


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that PIL can read") from None
    except READ_ERRORS as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _size(picture: Image.Image) -> str:
    return f"{picture.height} x {picture.width}"
