"""Images at their own size: how large they are fed, crops without resizing, batches with a budget of tokens."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from timm.data.naflex_transforms import get_image_size_for_seq
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torch import Tensor
from torch.utils.data import Sampler
from torchvision.transforms import CenterCrop, Compose, Resize

from cbsa_torch.images.decode import upright
from cbsa_torch.train.data.checked_images import CheckedImages, PlainImages
from cbsa_torch.train.errors import DataError

T = TypeVar("T")


class NativeSize(NamedTuple):
    """How large images are fed: as they are, unless they are too large, or patches would be left over."""

    patch_size: int
    """Side of a patch in pixels."""
    whole_patches: bool = False
    """Whether the model takes whole patches only: sides are then rounded up to multiples."""
    max_patches: int | None = None
    """Images of more patches are shrunk to at most so many, in their aspect. None: no limit."""

    def patches(self, height: int, width: int) -> int:
        """Of an image of so many pixels, those at the edge included."""
        return -(-height // self.patch_size) * -(-width // self.patch_size)

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels that an image gets."""
        if self.max_patches is not None and self.patches(height, width) > self.max_patches:
            _, size = get_image_size_for_seq((height, width), self.patch_size, self.max_patches, max_ratio=1.0)
            return size
        if self.whole_patches:
            return self.rounded(height, math.ceil), self.rounded(width, math.ceil)
        return height, width

    def rounded(self, side: float, rounding: Any) -> int:
        """A side as a multiple of the patch, one at least."""
        return self.patch_size * max(rounding(side / self.patch_size), 1)


class FitNativeSize:
    """A transform of Pillow images: those that need another size get it, the others stay as they are."""

    def __init__(self, size: NativeSize, interpolation: str) -> None:
        self.size, self.resample = size, str_to_pil_interp(interpolation)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Resize if need be."""
        height, width = self.size.fit(image.height, image.width)
        if (height, width) == (image.height, image.width):
            return image
        return image.resize((width, height), self.resample)


class RandomNativeCrop:
    """A transform of Pillow images: a random part, which keeps the scale of its pixels.

    Args:
        size: in whose patches parts are measured.
        scale: smallest and largest share of the area.
        ratio: smallest and largest factor on the image's aspect.
    """

    def __init__(self, size: NativeSize, scale: tuple[float, float], ratio: tuple[float, float]) -> None:
        self.size, self.scale, self.ratio = size, scale, ratio

    def __call__(self, image: Image.Image) -> Image.Image:
        """Crop, by Python's random numbers."""
        area = random.uniform(*self.scale)
        stretch = math.exp(random.uniform(*map(math.log, self.ratio)))
        height = self._side(image.height, math.sqrt(area / stretch))
        width = self._side(image.width, math.sqrt(area * stretch))
        top, left = random.randint(0, image.height - height), random.randint(0, image.width - width)
        return image.crop((left, top, left + width, top + height))

    def _side(self, full: int, share: float) -> int:
        side = full * min(share, 1.0)
        return self.size.rounded(side, round) if self.size.whole_patches else max(round(side), 1)


def at_native_size(transform: Any, first: Sequence[Any]) -> Compose:
    """A transform of timm with these steps in place of those that resize and crop."""
    sizing = (Resize, CenterCrop, RandomResizedCropAndInterpolation)
    return Compose([*first, *(step for step in transform.transforms if not isinstance(step, sizing))])


def collate_native(samples: Sequence[tuple[Tensor, int]]) -> tuple[list[Tensor], Tensor]:
    """A batch as a list of images and a tensor of labels."""
    images, targets = zip(*samples, strict=True)
    return list(images), torch.tensor(targets)


def image_size(dataset: Any, index: int) -> tuple[int, int]:
    """Height and width of an image; of a file only the beginning is read."""
    if isinstance(dataset, PlainImages):
        return image_size(dataset.source, index if dataset.indices is None else dataset.indices[index])
    if isinstance(dataset, CheckedImages):
        return dataset.size(index)
    image = upright(dataset[index][0])
    return image.height, image.width


def in_parts(items: Iterable[T], tokens_of: Callable[[T], int], max_tokens: int) -> Iterator[list[T]]:
    """Lists of items that follow each other, each of at most so many tokens, or of one item."""
    part: list[T] = []
    tokens = 0
    for item in items:
        more = tokens_of(item)
        if part and tokens + more > max_tokens:
            yield part
            part, tokens = [], 0
        part.append(item)
        tokens += more
    if part:
        yield part


class TokenBatches(Sampler[list[int]]):
    """Batches of images of many sizes with at most ``max_tokens`` tokens each, other ones in every epoch.

    Images are sorted by their tokens and cut into strata of K, from the largest on; a batch gets a random image
    of each stratum. So every image is seen in every epoch, the K batches have equally many images (some one
    less where K does not divide them) and nearly as many tokens, and none has more than the largest of all
    strata together. K is the smallest number for which these are ``max_tokens`` or fewer. It is the same in
    every epoch and a multiple of the processes, which take batches in turn. Where that is more than there are
    images, the largest are seen twice.

    Args:
        tokens: of each image.
        max_tokens: of a batch, at least those of the largest image.
        max_images: of a batch.
        seed: batches depend on it and on the epoch alone.
        processes: how many there are. process: this one.

    Raises:
        DataError: fewer images than processes.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        max_tokens: int,
        max_images: int,
        *,
        seed: int,
        processes: int = 1,
        process: int = 0,
    ) -> None:
        self.order = np.argsort(-np.asarray(tokens), kind="stable")
        self.seed, self.epoch, self.processes, self.process = seed, 0, processes, process
        n, descending = len(tokens), np.asarray(tokens)[self.order]
        most = -(-n // processes)  # one image in each
        if n < processes:
            raise DataError(f"{n} training images are fewer than one for each of {processes} process(es)")
        low = min(max(-(-n // (max_images * processes)), 1), most)
        high = most
        while low < high:  # the smallest number of rounds of the processes that fits
            middle = (low + high) // 2
            if descending[:: middle * processes].sum() <= max_tokens:
                high = middle
            else:
                low = middle + 1
        self.count = low * processes
        """Batches of all processes."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the batches of an epoch; call it before they are iterated over."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count // self.processes

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        filled = np.full(-(-len(self.order) // self.count) * self.count, -1)
        filled[: len(self.order)] = self.order
        filled[len(self.order) : self.count] = self.order[: max(self.count - len(self.order), 0)]
        strata = generator.permuted(filled.reshape(-1, self.count), axis=1)
        for batch in strata.T[self.process :: self.processes]:
            yield batch[batch >= 0].tolist()
