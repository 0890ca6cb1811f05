"""Pairs of an image file and the file of its mask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from cbsa_torch.images.errors import DataError, UnreadableImageError
from cbsa_torch.images.folders import Scan, image_files


class Pair(NamedTuple):
    """An image and its mask; whether the files are there shows when they are read.

    Examples:
        >>> from pathlib import Path
        >>> from cbsa_torch.images import Pair
        >>> Pair(Path("cat.jpg"), Path("cat.png")).mask.suffix
        '.png'
    """

    image: Path
    mask: Path


def pair_folders(
    images: Path, masks: Path, ends: tuple[str, str] | None = None, scan: Scan | None = None
) -> list[Pair]:
    """Pair the files of two folders whose paths within them are equal but for the ending.

    Sorted by these paths. To an image without a mask, and to a mask without an image, the name that the other
    file would have is given.

    Args:
        images, masks: the folders.
        ends: endings of the images and of the masks; other files are passed over. Default: all image files,
            each without its suffix.
        scan: notes what is passed over. Default: nobody.

    Raises:
        DataError: not a folder, no files at all, two files of one name but for the suffix, or an image that is
            there twice by a link (a mask may be).

    Examples:
        >>> from pathlib import Path
        >>> from cbsa_torch.images import pair_folders
        >>> pairs = pair_folders(Path("scenes/val/images"), Path("scenes/val/masks"))
        >>> len(pairs), pairs[0].mask.name
        (5, '0.png')
    """
    scan = Scan(images) if scan is None else scan
    image_ends, mask_ends = ends or (None, None)
    found = _by_key(images, image_ends, scan, shared=False), _by_key(masks, mask_ends, scan, shared=True)
    image_end, mask_end = ends or (".jpg", ".png")
    pairs = [
        Pair(
            found[0].get(key, images / f"{key}{image_end}"),
            found[1].get(key, masks / f"{key}{mask_end}"),
        )
        for key in sorted({*found[0], *found[1]})
    ]
    if not pairs:
        raise DataError("; ".join([f"no images found in {images}", *scan.left_out()]))
    return pairs


def check_pairs(pairs: Sequence[Pair], split: str, most: int, notes: Sequence[str] = ()) -> list[str]:
    """Lines about images without a mask and masks without an image.

    Args:
        pairs: of a split.
        split: its name, for the lines.
        most: how many files without a partner are allowed.
        notes: what else was found, for the error.

    Raises:
        DataError: more than that, or no pair is whole.

    Examples:
        >>> from pathlib import Path
        >>> from cbsa_torch.images import check_pairs, pair_folders
        >>> pairs = pair_folders(Path("scenes/val/images"), Path("scenes/val/masks"))
        >>> check_pairs(pairs, "val", most=0)  # all fit
        []
    """
    no_mask = [pair for pair in pairs if not pair.mask.exists()]
    no_image = [pair for pair in pairs if not pair.image.exists()]
    lone = {*no_mask, *no_image}
    lines = []
    if no_mask:
        lines.append(f"{split}: {len(no_mask)} image(s) without a mask, e.g. {no_mask[0].mask} is not there")
    if no_image:
        lines.append(
            f"{split}: {len(no_image)} mask(s) without an image, e.g. {no_image[0].image} is not there"
        )
    if len(lone) > most or len(lone) == len(pairs):
        shown = "".join(f" ({pair.mask} has no image)" for pair in no_image[:1])
        raise DataError(
            f"{'; '.join(lines)}{shown}; a mask must have the name of its image but for the ending"
            + (f" (data.max_bad_images is {most})" if len(lone) < len(pairs) else "")
            + "".join(f"; {note}" for note in notes)
        )
    return lines


def check_size(pair: Pair, image: Image.Image, mask: np.ndarray) -> None:
    """Refuse a mask (height, width) of another size than its image; raises UnreadableImageError.

    Examples:
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from PIL import Image
        >>> from cbsa_torch.images import Pair, check_size
        >>> pair = Pair(Path("cat.jpg"), Path("cat.png"))
        >>> check_size(pair, Image.new("RGB", (3, 2)), np.zeros((2, 3)))  # fits
    """
    height, width = mask.shape
    if (width, height) != image.size:
        turned = (
            "; they differ by a quarter turn: images and masks are read upright, as their EXIF orientation "
            "says and viewers show them, so turn the one that is not drawn so"
            if (height, width) == image.size
            else ""
        )
        raise UnreadableImageError(
            f"the mask is {width}x{height} pixels (width x height), its image {pair.image} "
            f"{image.size[0]}x{image.size[1]}{turned}"
        )


def _by_key(folder: Path, end: str | None, scan: Scan, *, shared: bool) -> dict[str, Path]:
    """Image files by their path within the folder without the ending."""
    found: dict[str, Path] = {}
    for path in image_files(folder, scan, shared=shared):
        if not path.name.endswith(end or ""):
            scan.leave_out(path, f"name does not end in {end}")
            continue
        key = path.relative_to(folder).as_posix().removesuffix(end or path.suffix)
        if key in found:
            raise DataError(f"{found[key]} and {path} differ in their ending alone: which one counts?")
        found[key] = path
    return found
