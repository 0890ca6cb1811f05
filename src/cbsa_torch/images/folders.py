"""Folders of images: names of splits, classes as folders, which files are images, and what is left out.

``ROOT/<split>/<class>/<image>`` holds images by class; :mod:`.layouts` reads folders of images and masks. All
readers walk by :func:`image_files` and note what plays no part in a :class:`Scan`.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path

from cbsa_torch._core.checks import nearest, some_of
from cbsa_torch.images.errors import DataError

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""The splits, and the names that their folders and lists may have, in small or capital letters."""

ALL_SPLIT_NAMES = ", ".join(name for names in SPLIT_NAMES.values() for name in names)

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Names of image files end in one of these, in small or capital letters."""

SYSTEM_NAMES = (
    *("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "__pycache__"),
    *("thumbs.db", "desktop.ini"),
)
"""Files and folders that systems and programs leave behind, in small letters; they are hidden, too."""


def is_hidden(name: str) -> bool:
    """Whether files and folders of this name are passed over: it begins with a dot, or is a system's own."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


MOST_NAMED = 20
"""Of more files and folders that are left out for one reason, three are named and the others counted."""


class Scan:
    """One reading of a data set's folder: what was taken, what was left out and why, and nothing is read twice.

    Args:
        root: the folder; paths are reported as seen from there.

    Examples:
        >>> from pathlib import Path
        >>> from cbsa_torch.images import Scan, class_splits
        >>> scan = Scan(Path("photos"))
        >>> splits = class_splits(Path("photos"), "auto", scan)
        >>> scan.left_out()  # nothing
        []
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._taken: list[str] = []
        self._left_out: dict[str, list[str]] = {}
        self._folders: dict[str, Path] = {}  # those that were read, by their real path
        self._links: dict[str, Path] = {}  # links to images, by the real path of the image

    def take(self, split: str, path: Path) -> None:
        """Note the folder or list of a split."""
        self._taken.append(f"{split} is {path}")

    def leave_out(self, path: Path, why: str) -> None:
        """Note that a file or folder plays no part."""
        name = str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)
        self._left_out.setdefault(why, []).append(name)

    def leave_out_others(self, folder: Path, taken: Collection[Path], why: str) -> None:
        """Note all in ``folder`` that is not ``taken``."""
        for path in sorted(folder.iterdir()):
            if path not in taken:
                self.leave_out(path, "hidden" if is_hidden(path.name) else why)

    def left_out(self) -> list[str]:
        """What was left out, a line for every reason."""
        return [
            f"left out, {why}: {some_of(sorted(names), 3 if len(names) > MOST_NAMED else MOST_NAMED)}"
            for why, names in self._left_out.items()
        ]

    def notes(self) -> list[str]:
        """What was taken for which split, and what was left out."""
        return [*self._taken, *self.left_out()]

    def enter(self, folder: Path) -> None:
        """Note a folder that is read; raises DataError where it is read already, by another way."""
        real = os.path.realpath(folder)
        if folder != self.root and Path(os.path.realpath(self.root)).is_relative_to(real):
            raise DataError(f"{folder} is a link to {real}, in which {self.root} lies: remove the link")
        other = self._folders.setdefault(real, folder)
        if other is not folder:
            raise DataError(f"{folder} is the folder {other} again, by a link: remove the link")

    def follow(self, link: Path) -> None:
        """Note an image that is a link; raises DataError where another link leads to the same file."""
        other = self._links.setdefault(os.path.realpath(link), link)
        if other is not link:
            raise DataError(f"{link} and {other} are links to the same image: remove one")

    def check_links(self) -> None:
        """Refuse a link to an image in one of the folders that were read; raises DataError."""
        for target, link in self._links.items():
            parent, name = os.path.split(target)
            if parent in self._folders and is_image_name(name) and not is_hidden(name):
                raise DataError(
                    f"{link} is a link to {self._folders[parent] / name}, which is read, too: remove the link"
                )


def is_image_name(name: str) -> bool:
    """Whether a file of this name is an image, by its ending."""
    return name.lower().endswith(EXTENSIONS)


def find_splits(root: Path) -> dict[str, Path]:
    """The folders of the splits that are there, by the names "train", "val" and "test"; there may be none.

    Raises:
        DataError: ``root`` is not a folder, a file is called like a split, or two folders have names of one.

    Examples:
        >>> from pathlib import Path
        >>> from cbsa_torch.images import find_splits
        >>> sorted(find_splits(Path("photos")))
        ['test', 'train', 'val']
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    found: dict[str, Path] = {}
    for path in sorted(root.iterdir()):
        split = split_of(path.name)
        if split is None:
            continue
        if not is_folder(path):
            raise DataError(f"{path} is called like a split but is not a folder: rename or remove it")
        if split in found:
            raise DataError(
                f"{root} has {found[split].name} and {path.name}, both names of the {split} split: "
                "rename or remove one of them"
            )
        found[split] = path
    return {split: found[split] for split in SPLIT_NAMES if split in found}


def split_of(name: str) -> str | None:
    """The split that a folder or list of this name holds, if it is one of their names."""
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), None)


def visible_folders(folder: Path) -> list[Path]:
    """The folders in a folder that are not hidden, sorted."""
    return sorted(path for path in folder.iterdir() if not is_hidden(path.name) and is_folder(path))


def is_folder(path: Path) -> bool:
    """Whether there is a folder; raises DataError for a link that leads nowhere, unless to an image."""
    if path.is_symlink() and not path.exists() and not is_image_name(path.name):
        raise DataError(f"{path} is a link that leads nowhere, to {path.readlink()}: mend or remove the link")
    return path.is_dir()


def class_splits(root: Path, splits: str, scan: Scan) -> dict[str, Path]:
    """The folders of class folders by split; ``root`` itself is "train" where there are no splits.

    Args:
        root: the folder of the data set.
        splits: what folders called "train", "val" ... are: "folders", splits; "none", classes; "auto", splits
            where they hold class folders.
        scan: notes which are taken and what is left out.

    Raises:
        DataError: ``root`` is not a folder, two folders of one split, or one that may be either.

    Examples:
        >>> from pathlib import Path
        >>> from cbsa_torch.images import Scan, class_splits
        >>> sorted(class_splits(Path("photos"), "auto", Scan(Path("photos"))))
        ['test', 'train', 'val']
    """
    found = find_splits(root) if splits != "none" else {}
    if not found and splits != "folders":
        found = {"train": root}
    if splits == "auto":
        for folder in found.values():
            if (
                folder != root
                and not visible_folders(folder)
                and any(is_image_name(path.name) for path in folder.iterdir())
            ):
                raise DataError(
                    f"{folder} is called like a split but has images and no class folders: if it is a class, "
                    "set data.splits to none; if it is a split, its images must lie in one folder per class, "
                    "or it must be moved away"
                )
    for split, folder in found.items():
        scan.take(split, folder)
    if root not in found.values():
        scan.leave_out_others(root, found.values(), f"not a split ({ALL_SPLIT_NAMES})")
    return found


def image_files(folder: Path, scan: Scan | None = None, *, shared: bool = False) -> list[Path]:
    """The image files in a folder and in those below it, sorted by name, numbers in names by their value.

    Links are followed. Hidden files and folders are passed over, as are other files.

    Args:
        folder: where to look.
        scan: notes what is passed over. Default: nobody.
        shared: several links may lead to one file.

    Raises:
        DataError: ``folder`` is not a folder, or links lead to the same twice. OSError: no permission.
    """
    if not folder.is_dir():
        there = [path.name for path in visible_folders(folder.parent)] if folder.parent.is_dir() else []
        raise DataError(f"{folder} is not a folder (folders in {folder.parent}: {some_of(there) or 'none'})")
    scan = Scan(folder) if scan is None else scan
    found: list[Path] = []
    pending = [folder]
    while pending:
        parent = pending.pop()
        scan.enter(parent)
        for entry in sorted(os.scandir(parent), key=lambda entry: entry.name):
            path, is_link = parent / entry.name, entry.is_symlink()
            if is_hidden(entry.name):
                scan.leave_out(path, "hidden")
            elif is_folder(path) if is_link else entry.is_dir():
                pending.append(path)
            elif not is_image_name(entry.name):
                scan.leave_out(path, f"no image by its ending ({path.suffix or 'none'})")
            elif path.exists() and not path.is_file() if is_link else not entry.is_file():
                scan.leave_out(path, "neither file nor folder")
            else:
                if is_link and not shared and path.exists():
                    scan.follow(path)
                found.append(path)
    scan.check_links()
    return sorted(found, key=_natural_order)


def class_folders(folder: Path) -> list[str]:
    """The classes of a split: the names of its folders, sorted.

    Raises:
        DataError: there are none.

    Examples:
        >>> from pathlib import Path
        >>> from cbsa_torch.images import class_folders
        >>> class_folders(Path("photos/train"))
        ['blue', 'green', 'red']
    """
    names = [path.name for path in visible_folders(folder)]
    if not names:
        raise DataError(
            f"{folder} has no class folders: images must lie in one folder per class, "
            f"e.g. {folder / 'cat' / 'photo.jpg'}"
        )
    return sorted(names)


def class_samples(folder: Path, class_names: Sequence[str], scan: Scan | None = None) -> list[tuple[Path, int]]:
    """The images of a split with their labels; a class's label is its place in ``class_names``.

    ``scan`` notes what is left out. Default: nobody.

    Raises:
        DataError: no images, a class that is not in ``class_names``, images that do not lie directly in a class
            folder, or what :func:`image_files` refuses.

    Examples:
        >>> from pathlib import Path
        >>> from cbsa_torch.images import class_samples
        >>> path, label = class_samples(Path("photos/val"), ["blue", "green", "red"])[0]
        >>> path.name, label
        ('blue_0.png', 0)
    """
    scan = Scan(folder) if scan is None else scan
    strange = [name for name in class_folders(folder) if name not in class_names]
    if strange:
        alike = [name for name in class_names if _letters(name) == _letters(strange[0])]
        raise DataError(
            f"{folder} has a class {strange[0]!r} that the training images have not"
            + (
                f", but {alike[0]!a} of the same letters in another form of Unicode (here {strange[0]!a}): "
                "rename one of the folders"
                if alike
                else nearest(strange[0], class_names)
            )
        )
    labels = {name: label for label, name in enumerate(class_names)}
    samples = []
    for path in image_files(folder, scan):
        if path.parent == folder:
            raise DataError(f"{folder} has images without a class, beside the class folders, e.g. {path.name}")
        if path.parent.parent != folder:
            raise DataError(
                f"{folder} has images that do not lie directly in a class folder, e.g. "
                f"{path.relative_to(folder)}: is the class {path.relative_to(folder).parts[0]!r} or "
                f"{path.parent.name!r}? (folders of splits are called {ALL_SPLIT_NAMES})"
            )
        samples.append((path, labels[path.parent.name]))
    if not samples:
        why = "".join(f"; {line}" for line in scan.left_out())
        raise DataError(f"no images found in {folder}; names of images end in {', '.join(EXTENSIONS)}{why}")
    return samples


def _letters(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _natural_order(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", str(path).lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(path)
