"""A part of a folder of images, as links."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def link_images(source: Path, target: Path, part: slice) -> None:
    """Make ``target`` a folder of links to a part, by name, of the images of each class in ``source``.

    Several processes may do so at the same time.
    """
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        own = target / folder.name
        own.mkdir(parents=True, exist_ok=True)
        for image in sorted(folder.iterdir())[part]:
            with suppress(FileExistsError):
                (own / image.name).symlink_to(image.resolve())
