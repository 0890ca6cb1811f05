"""Images: the embedded digits, folders, and whatever timm's dataset factory opens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_loader, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from cbsa_torch.train.config import DataConfig
from cbsa_torch.train.errors import DataError

IGNORE = -1
"""Target of an image that could not be read: neither the loss nor the metrics count it."""

DIGITS_SPLIT = {"train": 1257, "val": 180, "test": 360}
"""Sizes of the fixed stratified split of the digits (seed 0), whatever the seed of the run."""

READ_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for files that are not (whole) images."""


class InputSpec(NamedTuple):
    """What a model is fed."""

    input_size: tuple[int, int, int]
    """(channels, height, width)."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float

    @property
    def mode(self) -> str:
        """Pillow's name for the colour mode."""
        return "L" if self.input_size[0] == 1 else "RGB"


class Splits(NamedTuple):
    """Data sets of (image, label)."""

    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any] | None
    class_names: list[str]


def input_spec(model: nn.Module, image_size: int | None = None) -> InputSpec:
    """Read from a timm model what images it expects."""
    config = resolve_model_data_config(model)
    channels = getattr(model, "in_chans", config["input_size"][0])
    height, width = config["input_size"][1:] if image_size is None else (image_size, image_size)
    mean, std = config["mean"], config["std"]
    if len(mean) != channels:
        mean, std = (float(np.mean(mean)),) * channels, (float(np.mean(std)),) * channels
    return InputSpec(
        (channels, height, width), tuple(mean), tuple(std), config["interpolation"], config["crop_pct"]
    )


def open_splits(config: DataConfig, mode: str, skipped: Path | None = None) -> Splits:
    """Open the data set.

    Args:
        config: which and where.
        mode: colour mode of the images, "L" or "RGB".
        skipped: file that collects the names of unreadable images, with ``on_bad_image="skip"``.

    """
    if config.name == "digits":
        return _digits(mode)
    if config.root is None:
        raise DataError(f"data.root is required for data.name={config.name!r}: where are the images?")
    return _folder(config, mode, skipped) if config.name == "folder" else _from_timm(config, mode, skipped)


def make_loader(
    dataset: Dataset[Any], spec: InputSpec, config: DataConfig, batch_size: int, *, train: bool
) -> DataLoader[Any]:
    """Timm's loader with its transforms: augmentation if ``train``, else resize and centre crop."""
    augment: dict[str, Any] = {}
    if train:
        augment = {
            "scale": config.crop_scale,
            "ratio": config.crop_ratio,
            "hflip": config.hflip,
            "color_jitter": config.color_jitter,
            "auto_augment": config.auto_augment,
        }
    # A held-out part of a training set needs transforms of its own: timm sets them on the data set.
    if isinstance(dataset, Subset):
        dataset = _TransformedSubset(dataset)
    return create_loader(
        dataset,
        input_size=spec.input_size,
        batch_size=batch_size,
        is_training=train,
        use_prefetcher=False,
        mean=spec.mean,
        std=spec.std,
        interpolation=spec.interpolation,
        crop_pct=spec.crop_pct,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        pin_memory=torch.cuda.is_available(),
        **augment,
    )


def read_skipped(path: Path) -> list[str]:
    """The images left out, each once."""
    return sorted(set(path.read_text().splitlines())) if path.exists() else []


class DigitsDataset(Dataset[tuple[Any, int]]):
    """scikit-learn's digits: 8x8 grey scans as Pillow images."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, mode: str) -> None:
        self.pixels, self.labels, self.mode = pixels, labels, mode
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.pixels[index]).convert(self.mode)
        return image if self.transform is None else self.transform(image), int(self.labels[index])


def _digits(mode: str) -> Splits:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    rows, test = train_test_split(
        np.arange(len(pixels)), test_size=DIGITS_SPLIT["test"], stratify=digits.target, random_state=0
    )
    rows, val = train_test_split(
        rows, test_size=DIGITS_SPLIT["val"], stratify=digits.target[rows], random_state=0
    )

    def part(index: np.ndarray) -> DigitsDataset:
        return DigitsDataset(pixels[index], digits.target[index], mode)

    return Splits(part(rows), part(val), part(test), [str(name) for name in digits.target_names])


class CheckedImages(Dataset[tuple[Any, int]]):
    """timm's ImageDataset with one rule for unreadable images, instead of its silent replacement.

    ``stop`` raises DataError with the file's name; ``skip`` appends the name to a file (safe from several
    processes: one short line in append mode) and returns a blank image whose target is IGNORE.
    """

    def __init__(self, images: ImageDataset, mode: str, on_bad_image: str, skipped: Path | None) -> None:
        self.images, self.mode, self.on_bad_image, self.skipped = images, mode, on_bad_image, skipped
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            file, target, *_ = self.images.reader[index]
            with file:
                image = Image.open(file).convert(self.mode)
        except READ_ERRORS as error:
            name = self.images.filename(index, absolute=True)
            if self.on_bad_image == "stop":
                raise DataError(
                    f"cannot read image {name}: {error}; mend or remove it, or set data.on_bad_image to skip"
                ) from error
            if self.skipped is not None:
                with self.skipped.open("a") as log:
                    log.write(f"{name}\n")
            image, target = Image.new(self.mode, (32, 32)), IGNORE
        return image if self.transform is None else self.transform(image), int(target)


class _TransformedSubset(Dataset[tuple[Any, int]]):
    """A subset with a transform of its own."""

    def __init__(self, subset: Subset[Any]) -> None:
        self.source, self.indices = subset.dataset, subset.indices
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self.source[self.indices[index]]
        return self.transform(image), target


def _folder(config: DataConfig, mode: str, skipped: Path | None) -> Splits:
    root = Path(config.root or "")
    if not root.is_dir():
        raise DataError(f"data.root {root} is not a folder")
    found = {split: _find_split(root, split) for split in ("train", "val", "test")}
    train_root = found["train"] or root
    if train_root == root and (found["val"] or found["test"]):
        raise DataError(f"{root} has a val or test folder but no train folder")
    class_names = sorted(p.name for p in train_root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not class_names:
        raise DataError(
            f"{train_root} has no class folders: images must lie in one folder per class, "
            f"e.g. {train_root / 'cat' / 'photo.jpg'}"
        )
    class_map = {name: index for index, name in enumerate(class_names)}

    def open_folder(folder: Path) -> CheckedImages:
        strange = [p.name for p in folder.iterdir() if p.is_dir() and p.name not in class_map]
        strange = [name for name in strange if not name.startswith(".")]
        if strange:
            raise DataError(f"{folder} has classes that {train_root} has not: {', '.join(sorted(strange)[:5])}")
        try:
            images = ImageDataset(str(folder), reader="", class_map=class_map, input_img_mode=mode)
        except RuntimeError as error:
            raise DataError(f"no images found in {folder}: {error}") from error
        return CheckedImages(images, mode, config.on_bad_image, skipped)

    train: Dataset[Any] = open_folder(train_root)
    if found["val"]:
        val: Dataset[Any] = open_folder(found["val"])
    else:
        train, val = _hold_out(train, config.val_fraction)
    test = open_folder(found["test"]) if found["test"] else None
    return Splits(train, val, test, class_names)


def _find_split(root: Path, split: str) -> Path | None:
    names = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test",)}
    return next((root / name for name in names[split] if (root / name).is_dir()), None)


def _hold_out(train: Dataset[Any], fraction: float) -> tuple[Dataset[Any], Dataset[Any]]:
    """Split a training set in two, the same way for every seed."""
    count = len(train)  # type: ignore[arg-type]
    held = max(1, round(count * fraction))
    if held >= count:
        raise DataError(f"{count} training image(s) are too few to hold out {held} for validation")
    order: Sequence[int] = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return Subset(train, order[held:]), Subset(train, order[:held])


def _from_timm(config: DataConfig, mode: str, skipped: Path | None) -> Splits:
    def open_split(split: str, is_training: bool = False) -> Dataset[Any]:
        try:
            dataset = create_dataset(
                config.name,
                root=config.root,
                split=split,
                is_training=is_training,
                download=config.download,
                input_img_mode=mode,
            )
        except (AssertionError, RuntimeError, OSError, ValueError, ImportError) as error:
            raise DataError(f"timm cannot open split {split!r} of {config.name!r}: {error}") from error
        if isinstance(dataset, ImageDataset):
            return CheckedImages(dataset, mode, config.on_bad_image, skipped)
        return dataset

    train = open_split("train", is_training=True)
    val = open_split("validation")
    return Splits(train, val, None, _class_names(train))


def _class_names(dataset: Dataset[Any]) -> list[str]:
    source = dataset.images if isinstance(dataset, CheckedImages) else dataset
    names = getattr(source, "classes", None)
    if names:
        return [str(name) for name in names]
    mapping = getattr(getattr(source, "reader", None), "class_to_idx", None)
    if mapping:
        return [str(name) for name, _ in sorted(mapping.items(), key=lambda item: item[1])]
    targets = getattr(source, "targets", None)
    if targets is not None:
        return [str(i) for i in range(int(max(targets)) + 1)]
    raise DataError("cannot tell the classes of this data set; it has neither classes nor targets")


def is_iterable(loader: DataLoader[Any]) -> bool:
    """Whether the data set streams (and divides itself among processes)."""
    return isinstance(loader.dataset, IterableDataset)


def count_real(targets: Tensor) -> Tensor:
    """How many images of a batch could be read."""
    return (targets != IGNORE).sum()


def available_workers(requested: int) -> int:
    """No more reading processes than processors."""
    return min(requested, os.cpu_count() or 1)
