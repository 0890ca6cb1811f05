"""emoji-scenes: emoji of emoji64 pasted on drawn backgrounds, with exact masks.

A scene is drawn when it is read and is determined by (seed of the data set, split, index) and the settings
alone, whatever was drawn before it. In this order:

1. A background: plain, a linear gradient, smooth noise or stripes, each as often, in random colours, with a
   little noise on every pixel.
2. A number of emoji, uniform between the fewest and the most. For each a category, uniform, then an emoji of
   it from the same split of emoji64 and one of its two drawings, uniform.
3. Each is scaled (side uniform), perhaps mirrored, turned, and laid over what is there with its alpha; its
   centre is anywhere on the canvas, so that it may reach beyond. Where its alpha is at least a half, the label
   is its category; elsewhere the label stays what it was.

Label 0 is the background, labels 1 to 9 are the categories in the order of their names. No emoji is in two
splits, nor are look-alikes; but the outlines of flags and symbols repeat between the splits, hence
:func:`cbsa_torch.train.tasks.segmentation.miou_without`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from cbsa_torch.images import DataError
from cbsa_torch.train.tasks.segmentation.config import ScenesConfig

BACKGROUNDS = ("plain", "gradient", "noise", "stripes")
VENDORS = ("google", "twitter")
HALF = 128
"""Alpha from which on a pixel belongs to the emoji."""
_PIXEL_NOISE = 6.0


class EmojiScenes(Dataset[Any]):
    """Scenes of one split: samples (image, mask), or what ``transform`` makes of them.

    Args:
        arrays: of emoji64: drawings ``(n, 64, 64, 4)`` by vendor, their labels, splits and names.
        split: name of a split there.
        count: how many scenes.
        config: how they are drawn.
        mode: colour mode of the images, "L" or "RGB".

    Raises:
        DataError: a category has no emoji in this split.

    Examples:
        >>> from cbsa_torch.train import ScenesConfig
        >>> from cbsa_torch.train.tasks.segmentation import EmojiScenes
        >>> import numpy as np
        >>> scenes = EmojiScenes(np.load("emoji64.npz"), "train", count=10, config=ScenesConfig(size=48))
        >>> image, mask = scenes[0]
        >>> len(scenes), image.size, mask.shape
        (10, (48, 48), (48, 48))
    """

    def __init__(
        self, arrays: Mapping[str, np.ndarray], split: str, count: int, config: ScenesConfig, mode: str = "RGB"
    ) -> None:
        self.split, self.count, self.config, self.mode = split, count, config, mode
        self.transform: Any = None
        inside = arrays["split"] == [str(name) for name in arrays["split_names"]].index(split)
        names = [str(name) for name in arrays["category_names"]]
        self.categories = []
        """For each category the drawings (n, 64, 64, 4) of its emoji in this split, by each vendor."""
        for label, name in enumerate(names):
            rows = np.flatnonzero(inside & (arrays["label"] == label))
            if not len(rows):
                raise DataError(f"emoji64 has no emoji of category {name!r} in its {split} split")
            self.categories.append(np.concatenate([arrays[vendor][rows] for vendor in VENDORS]))
        self.class_names = ["background", *names]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        image, mask = self.draw(index)
        return (image, mask) if self.transform is None else self.transform(image, mask)

    def draw(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """A scene: the image, and its (size, size) int64 mask."""
        random = scene_generator(self.config.seed, self.split, index)
        size = self.config.size
        canvas = background(random, size)
        mask = np.zeros((size, size), dtype=np.int64)
        for _ in range(random.integers(self.config.emoji[0], self.config.emoji[1] + 1)):
            category = int(random.integers(len(self.categories)))
            drawings = self.categories[category]
            drawing = self._turned(random, drawings[random.integers(len(drawings))])
            top, left = (int(random.integers(size)) - side // 2 for side in drawing.shape[:2])
            paste(canvas, mask, drawing, top, left, category + 1)
        image = Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))
        return image.convert(self.mode), mask

    def _turned(self, random: np.random.Generator, drawing: np.ndarray) -> np.ndarray:
        """Scaled, mirrored and turned; Pillow weights colours by alpha when it interpolates RGBA."""
        config = self.config
        side = max(1, round(config.size * random.uniform(*config.scale)))
        picture = Image.fromarray(drawing)
        if random.random() < config.hflip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
        angle = random.uniform(-config.rotate, config.rotate)
        return np.asarray(picture.rotate(angle, Image.Resampling.BICUBIC, expand=True))


def scene_generator(seed: int, split: str, index: int) -> np.random.Generator:
    """The random numbers of one scene, from a hash that keeps neighbours apart."""
    digest = hashlib.blake2b(f"emoji-scenes/v1/{seed}/{split}/{index}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def background(random: np.random.Generator, size: int) -> np.ndarray:
    """A background (size, size, 3), float64 of about 0 to 255."""
    kind = BACKGROUNDS[random.integers(len(BACKGROUNDS))]
    first, second = random.uniform(0, 255, (2, 3))
    angle = random.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size] / size - 0.5
    along = x * np.cos(angle) + y * np.sin(angle)  # at most sqrt(1/2) from 0
    if kind == "plain":
        share = np.zeros((size, size))
    elif kind == "gradient":
        share = along / np.sqrt(2) + 0.5
    elif kind == "stripes":
        share = (along * random.uniform(3, 14)) % 1 < random.uniform(0.3, 0.7)
    else:
        coarse = random.random((int(random.integers(3, 17)),) * 2).astype(np.float32)
        share = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
    drawn = first + (second - first) * share[..., None]
    return drawn + random.normal(0, _PIXEL_NOISE, drawn.shape)


def paste(canvas: np.ndarray, mask: np.ndarray, drawing: np.ndarray, top: int, left: int, label: int) -> None:
    """Lay a drawing (h, w, 4) with straight alpha over part of a canvas and its mask, in place."""
    height, width = mask.shape
    rows, columns = slice(max(top, 0), top + len(drawing)), slice(max(left, 0), left + drawing.shape[1])
    seen = drawing[max(-top, 0) :, max(-left, 0) :][: height - rows.start, : width - columns.start]
    alpha = seen[..., 3:] / 255
    canvas[rows, columns] = canvas[rows, columns] * (1 - alpha) + seen[..., :3] * alpha
    mask[rows, columns][seen[..., 3] >= HALF] = label


def open_scenes(
    arrays: Mapping[str, np.ndarray], config: ScenesConfig, mode: str = "RGB"
) -> tuple[dict[str, EmojiScenes], list[str]]:
    """The splits by name, and the names of the classes: the background and the categories of emoji64.

    ``arrays``, ``config`` and ``mode`` are as for :class:`EmojiScenes`.

    Examples:
        >>> import numpy as np
        >>> from cbsa_torch.train import ScenesConfig
        >>> from cbsa_torch.train.tasks.segmentation import open_scenes
        >>> splits, class_names = open_scenes(np.load("emoji64.npz"), ScenesConfig(size=48, val=20))
        >>> len(splits["val"]), class_names[0]
        (20, 'background')
    """
    counts = {"train": config.train, "val": config.val, "test": config.test}
    scenes = {split: EmojiScenes(arrays, split, count, config, mode) for split, count in counts.items()}
    return scenes, scenes["train"].class_names
