"""Data sets of torchvision: those that timm's factory opens, and two more, as splits of ours.

timm calls a data set's test images "validation" where there are no others. An epoch must not be chosen by them,
so here validation images are held out of the training images, and the test images stay what they are.
"""

from __future__ import annotations

from torchvision.datasets import Flowers102, OxfordIIITPet

from cbsa_torch.images import DataError
from cbsa_torch.train.config import DataConfig
from cbsa_torch.train.data.checked_images import CheckedImages, ListedFiles, SkippedImages

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
        opened[split] = CheckedImages(ListedFiles(list(zip(files, images._labels, strict=True))), mode, skipped)
    return opened, class_names
