"""Images and masks as files, with the rule of :mod:`...data.checked_images` for what cannot be used.

Of a sample whose mask is bad, every pixel is ignored; its image is given all the same. A bad image is replaced
by a blank one, whose every pixel is ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from cbsa_torch.images import (
    IGNORE,
    LabelMap,
    Pair,
    UnreadableImageError,
    check_size,
    read_image_file,
    read_mask_file,
)
from cbsa_torch.train.data.checked_images import SkippedImages

BLANK_SIZE = (32, 32)


class MaskedImages(Dataset[Any]):
    """Samples (image, mask): a Pillow image and int64 labels (height, width), or what ``transform`` gives.

    Args:
        pairs: the files.
        mode: colour mode of the images, "L" or "RGB".
        labels: from the values in the masks to labels.
        skipped: counts and lists images and masks that cannot be used.
    """

    def __init__(self, pairs: Sequence[Pair], mode: str, labels: LabelMap, skipped: SkippedImages) -> None:
        self.pairs, self.mode, self.labels, self.skipped = list(pairs), mode, labels, skipped
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        image, mask = self._read(self.pairs[index])
        return (image, mask) if self.transform is None else self.transform(image, mask)

    def _read(self, pair: Pair) -> tuple[Image.Image, np.ndarray]:
        try:
            image = read_image_file(pair.image, self.mode)
        except UnreadableImageError as error:
            why = f"no image for mask {pair.mask}" if not pair.image.exists() else str(error)
            self.skipped.add(str(pair.image), why)
            image = Image.new(self.mode, BLANK_SIZE)
            return image, _ignored(image)
        try:
            return image, self._read_mask(pair, image)
        except UnreadableImageError as error:
            self.skipped.add(str(pair.mask), str(error))
            return image, _ignored(image)

    def _read_mask(self, pair: Pair, image: Image.Image) -> np.ndarray:
        if not pair.mask.exists():
            raise UnreadableImageError(f"no mask for image {pair.image}")
        values = read_mask_file(pair.mask)
        check_size(pair, image, values)
        return self.labels(values)


def _ignored(image: Image.Image) -> np.ndarray:
    return np.full((image.size[1], image.size[0]), IGNORE, dtype=np.int64)
