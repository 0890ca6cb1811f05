"""Images with masks of their foreground, for :func:`zero_shot_iou`: two folders of files, or PASCAL VOC."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from cbsa_torch.images import DataError, Pair, check_size, pair_folders, read_foreground, read_image_file
from cbsa_torch.images.layouts import voc_pairs

Transform = Callable[[Image.Image], Tensor]
"""Makes of an RGB picture what the model wants, ``(C, height, width)``; it must show the whole picture."""


class SegmentedImage(NamedTuple):
    """An image for the model, and which of its pixels are foreground.

    Examples:
        >>> from cbsa_torch.interpret import SegmentedImage
        >>> image = SegmentedImage(torch.rand(3, 64, 64), torch.ones(64, 64, dtype=torch.bool))
        >>> image.valid is None  # every pixel counts
        True
    """

    image: Tensor
    """``(C, height, width)`` as the model wants it."""
    mask: Tensor
    """``(height, width)`` bool, True = foreground."""
    valid: Tensor | None = None
    """``(height, width)`` bool, False = void: not counted. None: every pixel counts."""


class ForegroundImages:
    """Images and masks as files, read when asked for. Has a length, and can be iterated over again.

    Args:
        pairs: the files.
        transform: as for :func:`read_pairs`.

    Raises:
        ValueError: a file that is not there; at iteration, a file that cannot be read, or a mask of another
            size than its image. TypeError: a transform that is no function, or returns no tensor.

    Examples:
        >>> from torchvision.transforms import ToTensor
        >>> from cbsa_torch.interpret import read_pairs
        >>> images = read_pairs("scenes/val/images", "scenes/val/masks", ToTensor())
        >>> sum(bool(each.mask.any()) for each in images) == len(images)
        True
    """

    def __init__(self, pairs: list[Pair], transform: Transform) -> None:
        if not callable(transform):
            raise TypeError(f"transform must be a function of a PIL image, got {type(transform).__name__}")
        for image, mask in pairs:
            if not image.is_file():
                raise ValueError(f"no image for mask {mask}: {image} is not there")
            if not mask.is_file():
                raise ValueError(f"no mask for image {image}: {mask} is not there")
        self.pairs, self.transform = pairs, transform

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[SegmentedImage]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> SegmentedImage:
        pair = self.pairs[index]
        file = pair.image
        try:
            picture = read_image_file(file, "RGB")
            file = pair.mask
            mask, valid = read_foreground(file)
            check_size(pair, picture, mask)
        except DataError as error:
            raise ValueError(f"cannot use {file}: {error}") from error
        image = self.transform(picture)
        if not isinstance(image, Tensor):
            raise TypeError(f"transform must return a torch.Tensor, got {type(image).__name__}")
        return SegmentedImage(image, torch.from_numpy(mask), None if valid is None else torch.from_numpy(valid))


def read_pairs(images: str | Path, masks: str | Path, transform: Transform) -> ForegroundImages:
    """Pair the image files of two folders by name: ``cat.jpg`` with ``cat.png``.

    Masks have one channel and the size of their image; 0 is background and all else foreground. In masks
    with a palette, as PASCAL VOC has them, 255 is void and not counted; in others it is foreground.

    Args:
        images, masks: the folders; hidden files and files that are no images are passed over.
        transform: makes of an RGB ``PIL.Image`` the ``(C, height, width)`` tensor that the model wants. It may
            resize, but must not crop or flip: the mask stays as the file has it.

    Returns:
        Something to iterate over, for :func:`zero_shot_iou` (with ``resized=True`` if ``transform``
        resizes).

    Raises:
        ValueError: a folder that is not there or holds no images, or files without a partner.

    Examples:
        >>> from torchvision.transforms import ToTensor
        >>> from cbsa_torch.interpret import read_pairs
        >>> pairs = read_pairs("scenes/val/images", "scenes/val/masks", ToTensor())  # 0.png with 0.png, ...
        >>> image, mask, valid = next(iter(pairs))
        >>> len(pairs), mask.dtype
        (5, torch.bool)
    """
    return ForegroundImages(pair_folders(Path(images), Path(masks)), transform)


def read_voc(root: str | Path, transform: Transform, split: str = "val") -> ForegroundImages:
    """The segmented images of a split of PASCAL VOC: any object is foreground, palette index 255 void.

    Args:
        root: the folder with JPEGImages, SegmentationClass and ImageSets (``VOCdevkit/VOC2012``), or one above.
        transform: as for :func:`read_pairs`.
        split: a list in ImageSets/Segmentation, without ``.txt``.

    Raises:
        ValueError: no such folder, list or file, or an empty list.

    Examples:
        >>> from torchvision.transforms import ToTensor
        >>> from cbsa_torch.interpret import read_voc
        >>> pairs = read_voc("VOCdevkit/VOC2012", ToTensor(), split="val")
        >>> next(iter(pairs)).valid.dtype
        torch.bool
    """
    return ForegroundImages(voc_pairs(Path(root), split), transform)
