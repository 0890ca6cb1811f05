"""Image files, with one rule for those that cannot be read: leave them out, list them, stop at a limit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from torch.utils.data import Dataset

from cbsa_torch._core.text import readable
from cbsa_torch.images import IGNORE, DataError, UnreadableImageError, convert, read_image_file
from cbsa_torch.images.decode import read_image_size, reason

BLANK = (32, 32)
"""The size of what takes the place of an image that cannot be read."""


class SkippedImages:
    """The unreadable images of a run: in a file that all its processes and workers share.

    A line each, ``name<TAB>reason``. A process appends its line before it counts what is there: so whoever
    comes last sees all, and no lock is needed. A name counts once, whoever met it and however often.

    Args:
        path: the file; None: every process counts for itself.
        limit: how many images may be left out.
    """

    def __init__(self, path: str | Path | None, limit: int) -> None:
        self.path, self.limit = None if path is None else Path(path), limit
        self._own: dict[str, str] = {}

    def add(self, name: str, why: str) -> None:
        """Leave an image out.

        Raises:
            DataError: it is one more than the limit.
        """
        name, why = readable(name), readable(why)
        known = self._read()
        if name not in known:
            self._append(name, why)
            known = self._read()
        if len(known) > self.limit:
            where = f", listed in {self.path}" if self.path is not None else ""
            raise DataError(
                f"cannot read image {name}: {why}; with it {len(known)} image(s) cannot be read{where}, and "
                f"data.max_bad_images is {self.limit}; mend or remove them (and the list), or raise the limit"
            )

    def _read(self) -> dict[str, str]:
        return self._own if self.path is None else _read_list(self.path)

    def _append(self, name: str, why: str) -> None:
        if self.path is None:
            self._own[name] = why
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # one write of one short line in append mode: lines of several processes do not mix
        with self.path.open("ab", buffering=0) as file:
            file.write(f"{name}\t{why}\n".encode())


def read_skipped(path: Path) -> list[str]:
    """The images left out so far as lines ``name<TAB>reason``, each image once, sorted by name."""
    return [f"{name}\t{why}" for name, why in sorted(_read_list(path).items())]


def _read_list(path: Path) -> dict[str, str]:
    """Names and first reasons."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return {}
    found: dict[str, str] = {}
    for line in text.split("\n"):
        name, tab, why = line.partition("\t")
        if tab:  # else it is empty, or cut short by a full disk
            found.setdefault(name, why)
    return found


class ListedFiles:
    """Image files by (path, label), to be read as by a reader of timm."""

    def __init__(self, samples: Sequence[tuple[str | Path, int]]) -> None:
        self.samples = [(Path(path), int(label)) for path, label in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, label = self.samples[index]
        return path.open("rb"), label

    def filename(self, index: int, *, absolute: bool) -> str:
        """The path as it was given; a reader of timm gives None where an image is not a file of its own."""
        return str(self.samples[index][0])


class CheckedImages(Dataset[tuple[Any, int]]):
    """Samples (Pillow image, label); an unreadable image is listed, and is blank with the label ``IGNORE``.

    timm's ``ImageDataset`` would give the next image in its place, silently.

    Args:
        reader: of timm, or :class:`ListedFiles`: gives an open file and a label.
        mode: colour mode, "L" or "RGB".
        skipped: counts and lists the images that cannot be read.
    """

    def __init__(self, reader: Any, mode: str, skipped: SkippedImages) -> None:
        self.reader, self.mode, self.skipped = reader, mode, skipped
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            image, target = self._read(index)
        except UnreadableImageError as error:
            name = self.reader.filename(index, absolute=True)
            self.skipped.add(str(name or f"number {index}"), str(error))
            image, target = Image.new(self.mode, BLANK), IGNORE
        return image if self.transform is None else self.transform(image), int(target)

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image, without decoding it; those of the blank one if that cannot be done."""
        try:
            file, _ = self._open(index)
            with file:
                return read_image_size(file)
        except UnreadableImageError:
            return BLANK

    def _read(self, index: int) -> tuple[Image.Image, int]:
        file, target = self._open(index)
        with file:
            return read_image_file(file, self.mode), target

    def _open(self, index: int) -> tuple[Any, int]:
        try:
            file, target, *_ = self.reader[index]
        except OSError as error:  # the file vanished, or may not be read
            raise UnreadableImageError(reason(error)) from error
        return file, target


class PlainImages(Dataset[tuple[Any, int]]):
    """A data set of Pillow images, or some of its rows, in our colour mode and with a transform of its own.

    Args:
        source: of (image, label), without a transform.
        mode: "L" or "RGB"; None: as they are.
        indices: which rows. Default: all.
    """

    def __init__(self, source: Any, mode: str | None = None, indices: list[int] | None = None) -> None:
        self.source, self.mode, self.indices = source, mode, indices
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.source if self.indices is None else self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self.source[index if self.indices is None else self.indices[index]]
        if self.mode is not None:
            image = convert(image, self.mode)
        return image if self.transform is None else self.transform(image), int(target)
