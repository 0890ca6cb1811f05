"""Image files, with one rule for those that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import Dataset

from cbsa_torch.train.errors import DataError

IGNORE = -1
"""Target of an image that could not be read: neither the loss nor the metrics count it."""

READ_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for files that are not (whole) images."""


class CheckedImages(Dataset[tuple[Any, int]]):
    """timm's ImageDataset with one rule for unreadable images, instead of its silent replacement.

    ``stop`` raises DataError with the file's name; ``skip`` appends the name to a file (safe from several
    processes: one short line in append mode) and returns a blank image whose target is IGNORE.

    Args:
        images: timm's data set; only its reader is used.
        mode: colour mode, "L" or "RGB".
        on_bad_image: "stop" or "skip".
        skipped: the file that collects names.
        relabel: the reader's label to ours. Default: the same.
    """

    def __init__(
        self,
        images: ImageDataset,
        mode: str,
        on_bad_image: str,
        skipped: Path | None,
        relabel: dict[int, int] | None = None,
    ) -> None:
        self.images, self.mode, self.on_bad_image, self.skipped = images, mode, on_bad_image, skipped
        self.relabel = relabel
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            file, target, *_ = self.images.reader[index]
            with file:
                image = Image.open(file).convert(self.mode)
            target = target if self.relabel is None else self.relabel[target]
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


def read_skipped(path: Path) -> list[str]:
    """The images left out, each once."""
    return sorted(set(path.read_text().splitlines())) if path.exists() else []
