"""What was read of a data set, in lines for people: its splits, the images of each class, what was left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Generator
from torch.utils.data import DataLoader, Dataset, IterableDataset

from cbsa_torch._core.checks import some_of
from cbsa_torch._core.text import readable
from cbsa_torch.images import IGNORE
from cbsa_torch.images.masks import palette_colours
from cbsa_torch.train.data.arrays import ArrayImages
from cbsa_torch.train.data.checked_images import CheckedImages, ListedFiles, PlainImages
from cbsa_torch.train.data.splits import OpenedSplit, Splits
from cbsa_torch.train.data.workers import ignore_signals_in_workers

MOST_CLASSES = 20
"""With more classes, only the smallest and the largest are named."""


def describe(splits: Splits) -> list[str]:
    """The splits with their images, as far as can be told without reading these, and what was left out."""
    lines = [f"classes: {len(splits.class_names)} ({some_of(splits.class_names, MOST_CLASSES)})"]
    for name, dataset in splits.parts().items():
        lines += describe_split(OpenedSplit(name, dataset), splits.class_names)
    return [readable(line) for line in [*lines, *splits.notes]]


def describe_split(split: OpenedSplit, class_names: Sequence[str]) -> list[str]:
    """The images of a split, as far as can be told without reading them, and its notes."""
    unit = getattr(split.dataset, "unit", "images")
    lines = [f"{split.name}: {len(split.dataset):,} {unit}"]  # type: ignore[arg-type]
    labels = labels_of(split.dataset)
    if labels is not None:
        counts = np.bincount(labels, minlength=len(class_names))
        first, *warnings = class_lines(split.name, class_names, counts, unit)
        lines = [f"{lines[0]} ({first})", *warnings]
    return [readable(line) for line in [*lines, *split.notes]]


def labels_of(dataset: Any) -> np.ndarray | None:
    """The class of each image, where the data set knows it without reading the image."""
    if isinstance(dataset, PlainImages):
        labels = labels_of(dataset.source)
        return labels if labels is None or dataset.indices is None else labels[dataset.indices]
    if isinstance(dataset, ArrayImages):
        return np.asarray(dataset.labels)
    if isinstance(dataset, CheckedImages):
        samples = getattr(dataset.reader, "samples", None)
        return None if samples is None else np.array([label for _, label in samples])
    targets = getattr(dataset, "targets", None)
    return None if targets is None else np.asarray(targets)


def files_of(dataset: Any) -> list[tuple[Path, int | None]]:
    """The image files of a data set with their classes, which are None where masks have them."""
    if isinstance(dataset, PlainImages):
        files = files_of(dataset.source)
        return files if not files or dataset.indices is None else [files[i] for i in dataset.indices]
    if isinstance(dataset, CheckedImages) and isinstance(dataset.reader, ListedFiles):
        return list(dataset.reader.samples)
    return [(pair.image, None) for pair in getattr(dataset, "pairs", ())]


def palette_lines(dataset: Any, indices: Iterable[int]) -> list[str]:
    """A warning where masks draw one value in several colours: a program may have numbered the colours anew."""
    first: dict[int, tuple[tuple[int, ...], Path]] = {}
    for index in indices if hasattr(dataset, "pairs") else ():
        mask = dataset.pairs[index].mask
        for value, colour in palette_colours(mask).items():
            known, other = first.setdefault(value, (colour, mask))
            if known != colour:
                colours = f"the colour {known} in {other} and {colour} in {mask}"
                why = "labels are values, not colours; did a program number the palettes anew?"
                return [readable(f"warning: value {value} has {colours}: {why}")]
    return []


def class_lines(where: str, class_names: Sequence[str], counts: np.ndarray, unit: str) -> list[str]:
    """How many images, or which share of the pixels, each class has; then a warning of those without any.

    Args:
        where: what was counted, for the warning.
        class_names: in the order of the labels.
        counts: (classes,) images or pixels.
        unit: "images", "slides" or "pixels".
    """
    shown = [f"{count:,}" for count in counts.tolist()]
    if unit == "pixels":
        shown = [f"{100 * share:.3g} %" for share in (counts / max(counts.sum(), 1)).tolist()]
    of_class = [f"{name} {number}" for name, number in zip(class_names, shown, strict=True)]
    if len(class_names) > MOST_CLASSES:
        of_class = [f"from {of_class[counts.argmin()]} to {of_class[counts.argmax()]}"]
    lines = [", ".join(of_class)]
    without = [name for name, count in zip(class_names, counts, strict=True) if count == 0]
    if without:
        lines.append(f"warning: no {unit} of {some_of(without)} in {where}")
    return [readable(line) for line in lines]


def read_lines(
    where: str, class_names: Sequence[str], tally: np.ndarray, unit: str, ignore_label: int | None = None
) -> list[str]:
    """As :func:`class_lines`, of what :func:`read_all` counted; of pixels, how many are ignored, too."""
    ignored, counts = int(tally[0]), tally[1:]
    first, *warnings = class_lines(where, class_names, counts, unit)
    if unit == "pixels":
        first += f"; ignored {100 * ignored / max(int(tally.sum()), 1):.3g} %"
    if warnings and ignored and ignore_label is not None:
        warnings.append(
            f"pixels of ignore_label {ignore_label} are not trained on: if they are a class, leave it out and "
            "set data.mask_values (0 255 for binary masks)"
        )
    return [first, *warnings]


def read_all(
    dataset: Dataset[Any], classes: int, workers: int, indices: Iterable[int] | None = None
) -> np.ndarray:
    """Read samples (image, label or mask) and count images or pixels: (1 + classes,), the ignored ones first.

    Args:
        dataset: without a transform.
        classes: how many there are.
        workers: processes that read; 0: this one.
        indices: which samples. Default: all.
    """
    tallies: Any
    if isinstance(dataset, IterableDataset):
        tallies = (_tally(target, classes) for _, target in dataset)
    else:
        tallies = DataLoader(
            _Targets(dataset, classes, range(len(dataset)) if indices is None else indices),  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            generator=Generator(),  # else it draws from torch's own, and what is drawn later changes
        )
        ignore_signals_in_workers(tallies)
    total = np.zeros(1 + classes, dtype=np.int64)
    for tally in tallies:
        total += np.asarray(tally)
    return total


class _Targets(Dataset[np.ndarray]):
    """The tally of each sample."""

    def __init__(self, source: Any, classes: int, indices: Iterable[int]) -> None:
        self.source, self.classes, self.indices = source, classes, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> np.ndarray:
        _, target = self.source[self.indices[index]]
        return _tally(target, self.classes)


def _tally(target: Any, classes: int) -> np.ndarray:
    """How often each label is in a label or mask, the ignored ones first."""
    return np.bincount(np.ravel(target) - IGNORE, minlength=1 + classes)
