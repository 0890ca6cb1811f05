"""torchvision's transforms on an image and its mask together.

Training follows the recipe of Segmenter (Strudel et al. 2021, after MMSegmentation): a random scale, a random
crop in which no class has too large a share, a horizontal flip, photometric distortion, normalisation. Padding
has the mean colour, before the distortion, and is ignored. Evaluation keeps the whole image.

Masks are resized by taking the nearest pixel, so that no label comes up that was not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from cbsa_torch.images import IGNORE
from cbsa_torch.train.tasks.segmentation.config import SegmentationDataConfig

_TRIES = 10


class MaskedTransform:
    """From (Pillow image, mask) to tensors (channels, height, width) float32 and (height, width) int64.

    Args:
        steps: of torchvision, on an 8-bit image and its mask.
        mean, std: of each channel, for values of 0 to 1.
    """

    def __init__(self, steps: Sequence[v2.Transform], mean: Sequence[float], std: Sequence[float]) -> None:
        normalise = [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)]
        self.steps = v2.Compose([*steps, *normalise, v2.Normalize(list(mean), list(std))])

    def __call__(self, image: Image.Image, mask: np.ndarray) -> tuple[Tensor, Tensor]:
        """The tensors."""
        seen, labels = self.steps(tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(mask)))
        return seen.as_subclass(Tensor), labels.as_subclass(Tensor)


def training_transform(
    config: SegmentationDataConfig, mean: Sequence[float], std: Sequence[float]
) -> MaskedTransform:
    """Samples of ``config.crop_size``, normalised by ``mean`` and ``std`` of the channels.

    Draws from torch's generator alone, which the trainer seeds for every sample.

    Examples:
        >>> from PIL import Image
        >>> import numpy as np
        >>> from cbsa_torch.train import SegmentationDataConfig
        >>> from cbsa_torch.train.tasks.segmentation import training_transform
        >>> transform = training_transform(SegmentationDataConfig(crop_size=64), (0.5,) * 3, (0.5,) * 3)
        >>> image, mask = transform(Image.new("RGB", (90, 70)), np.zeros((70, 90), np.int64))
        >>> image.shape, mask.shape
        (torch.Size([3, 64, 64]), torch.Size([64, 64]))
    """
    base = config.crop_size if config.base_size is None else config.base_size
    smallest, largest = (max(1, round(base * scale)) for scale in config.scale)
    steps: list[v2.Transform] = [
        v2.RandomResize(smallest, largest + 1),
        MixedCrop(config.crop_size, [round(255 * value) for value in mean], config.max_class_share),
        v2.RandomHorizontalFlip(config.hflip),
    ]
    if config.photometric:
        steps.append(photometric_distortion())
    return MaskedTransform(steps, mean, std)


def evaluation_transform(mean: Sequence[float], std: Sequence[float]) -> MaskedTransform:
    """The whole image at its own size, normalised by ``mean`` and ``std`` of the channels.

    Examples:
        >>> from PIL import Image
        >>> import numpy as np
        >>> from cbsa_torch.train.tasks.segmentation import evaluation_transform
        >>> transform = evaluation_transform((0.5,) * 3, (0.5,) * 3)
        >>> image, mask = transform(Image.new("RGB", (90, 70)), np.zeros((70, 90), np.int64))
        >>> image.shape, image.min()
        (torch.Size([3, 70, 90]), tensor(-1.))
    """
    return MaskedTransform([], mean, std)


def photometric_distortion() -> v2.Transform:
    """Brightness, contrast, saturation and hue, each half of the time, in the strengths of MMSegmentation.

    torchvision's own RandomPhotometricDistort also swaps colour channels, which the recipe does not.
    """
    jitters = (
        v2.ColorJitter(brightness=32 / 255),
        v2.ColorJitter(contrast=0.5),
        v2.ColorJitter(saturation=0.5),
        v2.ColorJitter(hue=18 / 360),
    )
    return v2.RandomOrder([v2.RandomApply([jitter], p=0.5) for jitter in jitters])


class MixedCrop(v2.RandomCrop):
    """A random crop, drawn again (ten times at most in all) where one class has too large a share.

    Shares are of the pixels that are not ignored. Images that are too small are padded.

    Args:
        size: side of the square crop.
        fill: colour of the padding, for each channel 0 to 255; its labels are ignored.
        max_share: the largest share. None: any.
    """

    def __init__(self, size: int, fill: list[int], max_share: float | None) -> None:
        super().__init__(size, pad_if_needed=True, fill={tv_tensors.Image: fill, tv_tensors.Mask: IGNORE})
        self.max_share = max_share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Where to crop."""
        mask = next(part for part in flat_inputs if isinstance(part, tv_tensors.Mask))
        params: dict[str, Any] = {}
        for _ in range(_TRIES):
            params = super().make_params(flat_inputs)
            if self.max_share is None or largest_share(self.transform(mask, params)) <= self.max_share:
                break
        return params


def largest_share(labels: Tensor) -> float:
    """Share of the commonest class among the labels that are not ignored; 1 if all are ignored."""
    labels = labels.as_subclass(Tensor)
    known = labels[labels != IGNORE]
    return known.bincount().max().item() / known.numel() if known.numel() else 1.0
