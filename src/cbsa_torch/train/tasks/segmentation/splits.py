"""Segmentation data sets by name, as training, validation and test splits of images and masks.

Every pixel of a sample whose mask is bad is ignored; its image is given all the same. A bad image is replaced
by a blank one, whose every pixel is ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from cbsa_torch._core.checks import nearest
from cbsa_torch.images import (
    IGNORE,
    LabelMap,
    Pair,
    UnreadableImageError,
    check_pairs,
    check_size,
    layouts,
    read_image_file,
    read_mask_file,
)
from cbsa_torch.train.data.checked_images import SkippedImages
from cbsa_torch.train.data.fetch import load
from cbsa_torch.train.data.splits import (
    OpenedSplit,
    Splits,
    check_classes,
    check_split,
    held_out_note,
    hold_out,
)
from cbsa_torch.train.errors import ConfigError, DataError
from cbsa_torch.train.tasks.segmentation.config import SegmentationDataConfig, check_data_config
from cbsa_torch.train.tasks.segmentation.scenes import open_scenes

NAMES = ("folder", "ade20k", "voc", "pascal_context", "pascal_context_59", "cityscapes", "emoji-scenes")
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
        pair, image = self.pairs[index], None
        try:
            if not pair.image.exists():
                raise UnreadableImageError(f"no image for mask {pair.mask}")
            image = read_image_file(pair.image, self.mode)
            if not pair.mask.exists():
                raise UnreadableImageError(f"no mask for image {pair.image}")
            values = read_mask_file(pair.mask)
            check_size(pair, image, values)
            mask = self.labels(values)
        except UnreadableImageError as error:
            self.skipped.add(str(pair.image if image is None else pair.mask), str(error))
            image = Image.new(self.mode, BLANK_SIZE) if image is None else image
            mask = np.full(image.size[::-1], IGNORE, dtype=np.int64)
        return (image, mask) if self.transform is None else self.transform(image, mask)


def open_segmentation(
    config: SegmentationDataConfig, mode: str = "RGB", skipped: str | Path | None = None
) -> Splits:
    """Open a data set of samples (image, mask).

    Args:
        config: which and where.
        mode: colour mode of the images, "L" or "RGB".
        skipped: file that lists unreadable images and bad masks (:class:`SkippedImages`). Default: each process
            counts for itself.

    Raises:
        ConfigError: an unknown name, or a setting that cannot work. DataError: data that cannot be opened.

    Examples:
        >>> from cbsa_torch.train import SegmentationDataConfig
        >>> from cbsa_torch.train.tasks.segmentation import open_segmentation
        >>> splits = open_segmentation(SegmentationDataConfig(root="scenes"))
        >>> image, mask = splits.train[0]
        >>> splits.class_names, mask.shape == (image.height, image.width)
        (['ground', 'red', 'blue'], True)
    """
    check_data_config(config)
    if config.name not in NAMES:
        allowed = ", ".join(map(repr, NAMES))
        raise ConfigError(
            f"data.name must be one of {allowed}, got {config.name!r}{nearest(config.name, NAMES)}"
        )
    if config.name == "emoji-scenes":
        scenes, class_names = open_scenes(load("emoji64", config.root), config.scenes, mode)
        return Splits(scenes["train"], scenes["val"], scenes["test"], class_names)
    layout = open_layout(config)
    splits = layout.splits
    if "train" not in splits:
        raise DataError("; ".join([f"{config.root} has no train split", *layout.notes]))
    notes = [
        line
        for split, pairs in splits.items()
        for line in check_pairs(pairs, split, config.max_bad_images, layout.notes)
    ]
    if "val" not in splits:
        if config.name != "folder":
            raise DataError("; ".join([f"{config.root} has no validation split", *layout.notes]))
        pairs = splits["train"]
        train, val = hold_out(len(pairs), config.val_fraction)
        splits = {**splits, "train": [pairs[i] for i in train], "val": [pairs[i] for i in val]}
        notes.append(held_out_note(config))
    bad = SkippedImages(skipped, config.max_bad_images)
    opened = {split: MaskedImages(pairs, mode, layout.labels, bad) for split, pairs in splits.items()}
    notes += layout.notes
    return Splits(opened["train"], opened["val"], opened.get("test"), layout.class_names, tuple(notes))


def open_segmentation_split(
    config: SegmentationDataConfig,
    mode: str,
    split: str | None,
    class_names: list[str],
    skipped: str | Path | None = None,
) -> OpenedSplit:
    """One split for a model trained on ``class_names``; no other split need exist.

    ``mode`` and ``skipped`` are as for :func:`open_segmentation`. A ``split`` of None is the test
    split, or the validation split where there is none.

    Raises:
        DataError: other classes, or no such split. Otherwise as :func:`open_segmentation`.

    Examples:
        >>> from cbsa_torch.train import SegmentationDataConfig
        >>> from cbsa_torch.train.tasks.segmentation import open_segmentation_split
        >>> config = SegmentationDataConfig(root="scenes")
        >>> len(open_segmentation_split(config, "RGB", "val", ["ground", "red", "blue"]).dataset)
        5
    """
    check_data_config(config)
    check_split(split)
    if config.name in NAMES and config.name != "emoji-scenes":
        layout = open_layout(config)
        pairs = layout.splits
        name = split or ("test" if "test" in pairs else "val")
        if name in pairs and not (name == "train" and "val" not in pairs):
            check_classes(layout.class_names, class_names)
            lone = check_pairs(pairs[name], name, config.max_bad_images, layout.notes)
            bad = SkippedImages(skipped, config.max_bad_images)
            dataset = MaskedImages(pairs[name], mode, layout.labels, bad)
            return OpenedSplit(name, dataset, (*lone, *layout.notes))
    return open_segmentation(config, mode, skipped).choose(split, class_names)


def open_layout(config: SegmentationDataConfig) -> layouts.Layout:
    """The files of a data set that lies in a folder."""
    if config.root is None:
        raise DataError(f"data.root is required for data.name={config.name!r}: where are the images?")
    root = Path(config.root)
    if not root.is_dir():
        raise DataError(f"data.root {root} is not a folder")
    if config.name == "ade20k":
        return layouts.open_ade20k(root)
    if config.name == "voc":
        return layouts.open_voc(root)
    if config.name == "cityscapes":
        return layouts.open_cityscapes(root)
    if config.name.startswith("pascal_context"):
        return layouts.open_pascal_context(root, 59 if config.name.endswith("_59") else 60)
    return layouts.open_image_mask_folders(root, config.ignore_label, config.mask_values, config.splits)
