"""Data sets by name, as training, validation and test splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import ImageDataset, create_dataset
from torch.utils.data import Dataset, IterableDataset, Subset

from cbsa_torch._core.checks import nearest
from cbsa_torch.train.config.base import DataConfig
from cbsa_torch.train.data.digits import open_digits
from cbsa_torch.train.data.fetch import DATA_SETS
from cbsa_torch.train.data.fetched import open_fetched
from cbsa_torch.train.data.folder import class_folders, find_split, find_splits, open_folder
from cbsa_torch.train.data.images import CheckedImages, PlainImages, SkippedImages
from cbsa_torch.train.data.torchvision_sets import SETS, TEST_AS_VALIDATION, listed_images, open_set
from cbsa_torch.train.errors import ConfigError, DataError

OWN_NAMES = ("digits", *DATA_SETS, *SETS, "folder")


class Splits(NamedTuple):
    """Data sets of (image, label)."""

    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any] | None
    class_names: list[str]


def open_splits(config: DataConfig, mode: str, skipped: Path | None = None) -> Splits:
    """Open the data set for training.

    Args:
        config: which and where.
        mode: colour mode of the images, "L" or "RGB".
        skipped: file that lists unreadable images (:class:`SkippedImages`). Default: each process counts.

    Raises:
        ConfigError: an unknown name. DataError: data that cannot be opened, or without classes.
    """
    bad = SkippedImages(skipped, config.max_bad_images)
    if config.name == "digits" or config.name in DATA_SETS:
        opened = open_digits(mode) if config.name == "digits" else open_fetched(config.name, config.root, mode)
        arrays, class_names = opened
        return Splits(arrays["train"], arrays["val"], arrays["test"], class_names)
    # timm opens a folder under any name without a slash
    if "/" not in config.name and config.name not in ("folder", "", *SETS):
        raise ConfigError(
            f"data.name must be {', '.join(map(repr, OWN_NAMES))} or a timm name such as 'torch/cifar10', "
            f"got {config.name!r}{nearest(config.name, OWN_NAMES)}"
        )
    streamed_by_name = config.name.startswith(("hfds/", "hfids/", "tfds/"))
    if config.root is None and not streamed_by_name:
        raise DataError(f"data.root is required for data.name={config.name!r}: where are the images?")
    if config.name == "folder":
        return _from_folder(config, mode, bad)
    if config.name in SETS:
        parts, class_names = open_set(config, mode, bad)
        return _with_validation(parts["train"], parts.get("val"), parts["test"], class_names, config)
    return _from_timm(config, mode, bad)


def open_split(
    config: DataConfig, mode: str, split: str, class_names: list[str], skipped: Path | None = None
) -> Dataset[Any]:
    """One split for a model trained on ``class_names``; of a folder, no other split need exist."""
    if config.name == "folder" and config.root is not None:
        folder = find_split(Path(config.root), split)
        if folder is not None:
            return open_folder(folder, class_names, mode, SkippedImages(skipped, config.max_bad_images))
    splits = open_splits(config, mode, skipped)
    if splits.class_names != class_names:
        raise DataError(
            f"the data's {len(splits.class_names)} classes ({', '.join(splits.class_names[:5])}, ...) are not "
            f"the model's {len(class_names)} ({', '.join(class_names[:5])}, ...)"
        )
    opened = {"train": splits.train, "val": splits.val, "test": splits.test}
    if split not in opened:
        raise ConfigError(f"split must be one of {', '.join(opened)}, got {split!r}{nearest(split, opened)}")
    dataset = opened[split]
    if dataset is None:
        raise DataError(f"this data set has no {split} split; choose another")
    return dataset


def _from_folder(config: DataConfig, mode: str, skipped: SkippedImages) -> Splits:
    found = find_splits(Path(config.root or ""))
    class_names = class_folders(found["train"])
    opened = {name: open_folder(folder, class_names, mode, skipped) for name, folder in found.items()}
    empty = set(range(len(class_names))) - set((opened["train"].relabel or {}).values())
    if empty:
        raise DataError(f"{found['train'] / class_names[min(empty)]} holds no images")
    return _with_validation(opened["train"], opened.get("val"), opened.get("test"), class_names, config)


def _with_validation(
    train: Dataset[Any],
    val: Dataset[Any] | None,
    test: Dataset[Any] | None,
    class_names: list[str],
    config: DataConfig,
) -> Splits:
    if val is None:
        train, val = _hold_out(train, config.val_fraction)
    return Splits(train, val, test, class_names)


def _hold_out(train: Dataset[Any], fraction: float) -> tuple[Dataset[Any], Dataset[Any]]:
    """Split a training set in two, the same way for every seed."""
    count = len(train)  # type: ignore[arg-type]
    held = max(1, round(count * fraction))
    if held >= count:
        raise DataError(f"{count} training image(s) are too few to hold out {held} for validation")
    order: Sequence[int] = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return Subset(train, order[held:]), Subset(train, order[:held])


def _from_timm(config: DataConfig, mode: str, skipped: SkippedImages) -> Splits:
    def open_split(split: str, is_training: bool = False) -> Dataset[Any]:
        try:
            return create_dataset(
                config.name,
                root=config.root,
                split=split,
                is_training=is_training,
                download=config.download,
                input_img_mode=mode,
            )
        except (AssertionError, RuntimeError, OSError, ValueError, ImportError) as error:
            raise DataError(f"timm cannot open split {split!r} of {config.name!r}: {error}") from error

    train = open_split("train", is_training=True)
    other = open_split("validation")
    class_names = _class_names(train)
    if _listing(train, "class_to_idx") != _listing(other, "class_to_idx"):
        raise DataError(f"training and validation split of {config.name!r} have different classes")
    # without a folder for validation, timm opens the training images again
    samples = _listing(train, "samples")
    only_train = samples is not None and samples == _listing(other, "samples")
    train, other = _as_ours(train, mode, skipped), _as_ours(other, mode, skipped)
    if config.name.lower().removeprefix("torch/") in TEST_AS_VALIDATION:
        return _with_validation(train, None, other, class_names, config)
    return _with_validation(train, None if only_train else other, None, class_names, config)


def _as_ours(dataset: Dataset[Any], mode: str, skipped: SkippedImages) -> Dataset[Any]:
    """With our decoding and rule for unreadable images, where the data set lets us."""
    if isinstance(dataset, ImageDataset):
        return CheckedImages(dataset, mode, skipped)
    samples = _listing(dataset, "samples")
    if samples is not None:  # torchvision's folders
        return listed_images(samples, mode, skipped)
    return dataset if isinstance(dataset, IterableDataset) else PlainImages(dataset, mode)


def _listing(dataset: Dataset[Any], name: str) -> Any:
    """What a folder-like data set says about its files: ``samples`` or ``class_to_idx``."""
    return getattr(getattr(dataset, "reader", dataset), name, None)


def _class_names(dataset: Dataset[Any]) -> list[str]:
    names = getattr(dataset, "classes", None)
    if names:
        return [str(name) for name in names]
    mapping = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if mapping:
        return [str(name) for name, _ in sorted(mapping.items(), key=lambda item: item[1])]
    targets = getattr(dataset, "targets", None)
    if targets is not None:
        return [str(i) for i in range(int(max(targets)) + 1)]
    raise DataError("cannot tell the classes of this data set; it has neither classes nor targets")
