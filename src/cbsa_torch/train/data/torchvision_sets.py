"""Data sets of torchvision: those that timm's factory opens, and two more, as splits of ours.

timm calls a data set's test images "validation" where there are no others. An epoch must not be chosen by them,
so here validation images are held out of the training images, and the test images stay what they are.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data import ImageDataset
from timm.data.readers.reader import Reader
from torchvision.datasets import Flowers102, OxfordIIITPet

from cbsa_torch.train.config.base import DataConfig
from cbsa_torch.train.data.images import CheckedImages, SkippedImages
from cbsa_torch.train.errors import DataError

TEST_AS_VALIDATION = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
"""Data sets ``torch/NAME`` of timm that have training and test images alone."""

SETS = {"flowers102": Flowers102, "pets": OxfordIIITPet}
"""By ``data.name``; downloaded by torchvision, which checks MD5 sums."""

_PARTS: dict[str, dict[str, str]] = {
    "flowers102": {"train": "train", "val": "val", "test": "test"},
    "pets": {"train": "trainval", "test": "test"},
}
"""The official splits: 1,020 / 1,020 / 6,149 flowers; 3,680 / 3,669 pets."""


def open_set(
    config: DataConfig, mode: str, skipped: SkippedImages
) -> tuple[dict[str, CheckedImages], list[str]]:
    """The official splits of a data set in ``SETS`` by name, and the names of its classes.

    Raises:
        DataError: it is not there (``data.download``), or damaged.
    """
    opened: dict[str, CheckedImages] = {}
    class_names: list[str] = []
    for split, official in _PARTS[config.name].items():
        try:
            images = SETS[config.name](config.root, split=official, download=config.download)
        except (RuntimeError, OSError, ValueError) as error:
            raise DataError(
                f"torchvision cannot open {config.name} in {config.root}: {error} "
                "(--data.download lets it fetch the files)"
            ) from error
        files = images._image_files if isinstance(images, Flowers102) else images._images
        class_names = class_names or list(images.classes)
        opened[split] = listed_images(list(zip(files, images._labels, strict=True)), mode, skipped)
    return opened, class_names


def listed_images(samples: Sequence[tuple[Any, int]], mode: str, skipped: SkippedImages) -> CheckedImages:
    """Image files by (path, label), read as those of a folder are."""
    return CheckedImages(ImageDataset("", reader=_Listed(samples)), mode, skipped)


class _Listed(Reader):
    """A reader of timm over a list of (path, label)."""

    def __init__(self, samples: Sequence[tuple[Any, int]]) -> None:
        super().__init__()
        self.samples = [(str(path), int(label)) for path, label in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[io.BufferedReader, int]:
        path, label = self.samples[index]
        return Path(path).open("rb"), label

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        return Path(path).name if basename else path
