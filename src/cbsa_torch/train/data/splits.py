"""Data sets by name, as training, validation and test splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import ImageDataset, create_dataset
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import Flowers102, OxfordIIITPet

from cbsa_torch._core.checks import nearest, some_of
from cbsa_torch.images import SPLIT_NAMES, Scan, class_folders, class_samples, class_splits
from cbsa_torch.images.folders import visible_folders
from cbsa_torch.train.config import FOLDERS, DataConfig, DataSource
from cbsa_torch.train.data.arrays import open_digits, open_fetched
from cbsa_torch.train.data.checked_images import CheckedImages, ListedFiles, PlainImages, SkippedImages
from cbsa_torch.train.data.fetch import DATA_SETS
from cbsa_torch.train.errors import ConfigError, DataError

TEST_AS_VALIDATION = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
"""Data sets ``torch/NAME`` of timm that have training and test images alone.

timm calls their test images "validation". An epoch must not be chosen by them, so validation images are held
out of the training images, and the test images stay what they are.
"""

SETS: dict[str, tuple[Any, dict[str, str]]] = {
    "flowers102": (Flowers102, {"train": "train", "val": "val", "test": "test"}),
    "pets": (OxfordIIITPet, {"train": "trainval", "test": "test"}),
}
"""By ``data.name``, with the official splits: 1,020 / 1,020 / 6,149 flowers; 3,680 / 3,669 pets. Downloaded by
torchvision, which checks MD5 sums."""

OWN_NAMES = ("digits", *DATA_SETS, *SETS, "folder")


class OpenedSplit(NamedTuple):
    """One split of a data set, for a model that is trained."""

    name: str
    """"train", "val" or "test"."""
    dataset: Dataset[Any]
    notes: tuple[str, ...] = ()
    """Where it was read from, and what plays no part: a line each."""


class Splits(NamedTuple):
    """Data sets of samples (image, label) or (image, mask), each with a ``transform`` to be set."""

    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any] | None
    class_names: list[str]
    notes: tuple[str, ...] = ()
    """Which folders were taken for splits, and what plays no part: a line each."""

    def parts(self) -> dict[str, Dataset[Any]]:
        """The data sets by "train", "val" and, where there is one, "test"."""
        parts = {"train": self.train, "val": self.val}
        return parts if self.test is None else {**parts, "test": self.test}

    def choose(self, split: str | None, class_names: list[str]) -> OpenedSplit:
        """A split, for a model trained on ``class_names``.

        A ``split`` of None is the test split, or the validation split where there is none.

        Raises:
            DataError: other classes, or no such split.
        """
        check_classes(self.class_names, class_names)
        name = split or ("val" if self.test is None else "test")
        dataset = self.parts().get(name)
        if dataset is None:
            raise DataError(f"this data set has no {name} split with labels; choose another")
        return OpenedSplit(name, dataset, self.notes)


def check_split(split: str | None) -> None:
    """Refuse a split that is not "train", "val", "test" or None; raises ConfigError."""
    if split is not None and split not in SPLIT_NAMES:
        raise ConfigError(
            f"split must be one of {', '.join(SPLIT_NAMES)}, got {split!r}{nearest(split, SPLIT_NAMES)}"
        )


def check_classes(found: list[str], expected: list[str]) -> None:
    """Refuse data of other classes than the model's; raises DataError."""
    if found != expected:
        raise DataError(
            f"the data's {len(found)} classes ({some_of(found)}) are not the model's "
            f"{len(expected)} ({some_of(expected)})"
        )


def hold_out(count: int, fraction: float) -> tuple[list[int], list[int]]:
    """Rows of ``count`` training images for training and for validation, the same for every seed.

    Raises:
        DataError: too few images for both.
    """
    held = max(1, round(count * fraction))
    if held >= count:
        raise DataError(f"{count} training image(s) are too few to hold out {held} for validation")
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return order[held:], order[:held]


def held_out_note(config: DataSource) -> str:
    """Where validation images come from that have no folder of their own."""
    return f"val is held out of train: there is no val split (data.val_fraction {config.val_fraction:g})"


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
    if "/" not in config.name and config.name not in (*FOLDERS, *SETS):
        raise ConfigError(
            f"data.name must be {', '.join(map(repr, OWN_NAMES))} or a timm name such as 'torch/cifar10', "
            f"got {config.name!r}{nearest(config.name, OWN_NAMES)}"
        )
    streamed_by_name = config.name.startswith(("hfds/", "hfids/", "tfds/"))
    if config.root is None and not streamed_by_name:
        raise DataError(f"data.root is required for data.name={config.name!r}: where are the images?")
    if _is_folder(config):
        return _from_folder(config, mode, bad)
    if config.name in SETS:
        parts, class_names = _open_torchvision(config, mode, bad)
        return _with_validation(config, class_names, parts["train"], parts.get("val"), parts["test"])
    return _from_timm(config, mode, bad)


def open_split(
    config: DataConfig, mode: str, split: str | None, class_names: list[str], skipped: Path | None = None
) -> OpenedSplit:
    """One split for a model trained on ``class_names``; of a folder, no other need exist.

    A ``split`` of None is the test split, or the validation split where there is none.

    Raises:
        DataError: other classes, or no such split. Otherwise as :func:`open_splits`.
    """
    check_split(split)
    if config.root is not None and _is_folder(config):
        root = Path(config.root)
        scan = Scan(root)
        found = class_splits(root, config.splits, scan)
        name = split or ("test" if "test" in found else "val")
        held_out = name == "train" and "val" not in found  # some of these are for validation
        if found.get(name, root) != root and not held_out:
            samples = ListedFiles(class_samples(found[name], class_names, scan))
            bad = SkippedImages(skipped, config.max_bad_images)
            return OpenedSplit(name, CheckedImages(samples, mode, bad), tuple(scan.notes()))
    return open_splits(config, mode, skipped).choose(split, class_names)


def _is_folder(config: DataConfig) -> bool:
    """Whether it is a folder of class folders, which is read by our rules whatever timm calls it."""
    return config.name == "folder" or (config.name in FOLDERS and Path(config.root or "").is_dir())


def class_names_of(config: DataConfig, mode: str, split: str | None) -> list[str]:
    """The classes of a data set; of a folder without training images, those of the split that is asked for.

    Args:
        config: the data set.
        mode: of its images.
        split: the one that will be used. Default: test, else validation.
    """
    if config.root is not None and _is_folder(config):
        root = Path(config.root)
        found = class_splits(root, config.splits, Scan(root))
        used = [name for name in ((split,) if split else ("test", "val")) if name in found]
        if used and "train" not in found:
            return class_folders(found[used[0]])
    return open_splits(config, mode).class_names


def _from_folder(config: DataConfig, mode: str, skipped: SkippedImages) -> Splits:
    root = Path(config.root or "")
    scan = Scan(root)
    found = class_splits(root, config.splits, scan)
    if "train" not in found:
        there = some_of([path.name for path in visible_folders(root)]) or "none"
        raise DataError(
            f"{root} has no train folder (its folders: {there}); if these are all classes, set data.splits to "
            "none"
        )
    class_names = class_folders(found["train"])
    if class_names == ["images", "masks"]:
        raise DataError(
            f"{found['train']} has the folders images and masks: to train a segmenter on them, add --config "
            "segmenter_ade20k --data.name folder; if they are classes, rename one"
        )
    samples = {split: class_samples(folder, class_names, scan) for split, folder in found.items()}
    empty = set(range(len(class_names))) - {label for _, label in samples["train"]}
    if empty:
        why = "".join(f"; {line}" for line in scan.left_out())
        raise DataError(f"{found['train'] / class_names[min(empty)]} holds no images{why}")
    if len(class_names) < 2:
        raise DataError(
            f"{found['train']} has one class folder, {class_names[0]}, and nothing to tell it from: images of "
            "something else need a folder of their own"
        )
    opened = {split: CheckedImages(ListedFiles(listed), mode, skipped) for split, listed in samples.items()}
    splits = _with_validation(config, class_names, opened["train"], opened.get("val"), opened.get("test"))
    return splits._replace(notes=(*splits.notes, *scan.notes()))


def _open_torchvision(
    config: DataConfig, mode: str, skipped: SkippedImages
) -> tuple[dict[str, CheckedImages], list[str]]:
    """The official splits of a data set in ``SETS`` by name, and the names of its classes."""
    opened: dict[str, CheckedImages] = {}
    class_names: list[str] = []
    source, official_splits = SETS[config.name]
    for split, official in official_splits.items():
        try:
            images = source(config.root, split=official, download=config.download)
        except (RuntimeError, OSError, ValueError) as error:
            raise DataError(
                f"torchvision cannot open {config.name} in {config.root}: {error} "
                "(--data.download lets it fetch the files)"
            ) from error
        files = images._image_files if isinstance(images, Flowers102) else images._images
        class_names = class_names or list(images.classes)
        opened[split] = CheckedImages(ListedFiles(list(zip(files, images._labels, strict=True))), mode, skipped)
    return opened, class_names


def _with_validation(config: DataConfig, class_names: list[str], train: Any, val: Any, test: Any) -> Splits:
    """The splits; without ``val``, some training images are held out."""
    if val is None:
        # each with a transform of its own: held-out images are not augmented
        rows = hold_out(len(train), config.val_fraction)
        train, val = (PlainImages(train, indices=part) for part in rows)
        return Splits(train, val, test, class_names, (held_out_note(config),))
    return Splits(train, val, test, class_names)


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
        return _with_validation(config, class_names, train, None, other)
    return _with_validation(config, class_names, train, None if only_train else other, None)


def _as_ours(dataset: Dataset[Any], mode: str, skipped: SkippedImages) -> Dataset[Any]:
    """With our decoding and rule for unreadable images, where the data set lets us."""
    if isinstance(dataset, ImageDataset):
        return CheckedImages(dataset.reader, mode, skipped)
    samples = _listing(dataset, "samples")
    if samples is not None:  # torchvision's folders
        return CheckedImages(ListedFiles(samples), mode, skipped)
    return dataset if isinstance(dataset, IterableDataset) else PlainImages(dataset, mode)


def _listing(dataset: Dataset[Any], name: str) -> Any:
    """What a folder-like data set says about its files: ``samples`` or ``class_to_idx``."""
    return getattr(getattr(dataset, "reader", dataset), name, None)


def _class_names(dataset: Dataset[Any]) -> list[str]:
    names = getattr(dataset, "classes", None)
    if names:
        return [str(name) for name in names]
    mapping = _listing(dataset, "class_to_idx")
    if mapping:
        return [str(name) for name, _ in sorted(mapping.items(), key=lambda item: item[1])]
    targets = getattr(dataset, "targets", None)
    if targets is not None:
        return [str(i) for i in range(int(max(targets)) + 1)]
    raise DataError("cannot tell the classes of this data set; it has neither classes nor targets")
