"""From a mask file to class labels, one whole number per pixel, or to foreground and background.

Pillow decodes. Refuses files from which labels would have to be guessed: colours, transparency, all but PNG,
TIFF, BMP and PGM, compression that changes labels (TIFF may have it, too), several pages, grey of 2 or 4 bits
and small PGM (which Pillow stretches to 0..255), PBM and TIFF in which 0 is white (inverted), and values that
the data set does not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cbsa_torch._core.checks import some_of
from cbsa_torch.images.decode import reason, upright
from cbsa_torch.images.errors import DataError, UnreadableImageError

IGNORE = -1
"""Label of pixels without a class, and of images that cannot be read: neither losses nor scores count it."""
VOID = 255
"""Palette index of pixels that stand for no class: PASCAL VOC draws it around objects."""

_UNKNOWN = -2


def read_mask_file(path: str | Path) -> np.ndarray:
    """The pixel values of a mask, (height, width) int64: indices of a palette image, levels of a grey one.

    Raises:
        UnreadableImageError: whatever is wrong with the file, in one line without its name.

    Examples:
        >>> from PIL import Image
        >>> from cbsa_torch.images import read_mask_file
        >>> Image.new("L", (3, 2), 7).save("mask.png")
        >>> read_mask_file("mask.png").tolist()
        [[7, 7, 7], [7, 7, 7]]
    """
    return _read(path)[0]


def read_foreground(path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    """A mask of objects: value 0 is background, all else foreground; in a palette image, 255 is neither (void).

    Returns:
        foreground (height, width) bool, and valid (height, width) bool, False = void; the latter is None for
        grey masks, where every pixel counts.

    Raises:
        UnreadableImageError: whatever is wrong with the file, in one line without its name.

    Examples:
        >>> from PIL import Image
        >>> from cbsa_torch.images import read_foreground
        >>> Image.new("L", (3, 2), 255).save("mask.png")
        >>> foreground, valid = read_foreground("mask.png")
        >>> foreground.all(), valid is None
        (np.True_, True)
    """
    values, is_palette = _read(path)
    if not is_palette:
        return values != 0, None
    valid = values != VOID
    return (values != 0) & valid, valid


def _read(path: str | Path) -> tuple[np.ndarray, bool]:
    """The values, and whether they are indices of a palette."""
    try:
        with Path(path).open("rb") as file, Image.open(file) as image:
            _refuse_ambiguous(image)
            return np.asarray(upright(image)).astype(np.int64), image.mode == "P"
    except UnreadableImageError:
        raise
    except Exception as error:  # of broken files, decoders raise nearly anything
        raise UnreadableImageError(reason(error)) from error


def _refuse_ambiguous(image: Image.Image) -> None:
    compression = image.info.get("compression") if image.format == "TIFF" else None
    if image.format not in ("PNG", "TIFF", "BMP", "PPM") or compression in ("jpeg", "tiff_jpeg", "webp"):
        kind = f"TIFF with {compression}" if compression else image.format
        why = "writers renumber palettes" if image.format == "GIF" else "compression changes labels"
        raise UnreadableImageError(f"a mask in {kind}, whose {why}; make it anew as PNG")
    pages = getattr(image, "n_frames", 1)
    if pages > 1:
        raise UnreadableImageError(f"a mask of {pages} pages, of which only one would be read; save one as PNG")
    if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        raise UnreadableImageError(
            f"a mask in mode {image.mode}, where one number per pixel is expected (mode L or P); if its "
            "colours stand for classes, convert it once with "
            "cbsa_torch.images.labels_from_colours and save the result as PNG"
        )
    if image.format == "PPM" and (image.mode == "1" or image.tile[0].codec_name != "raw"):
        raise UnreadableImageError(
            "a PBM or PGM mask of fewer than 8 bits, which is read stretched or inverted; make it anew as PNG"
        )
    raw_mode = str(image.tile[0].args) if image.tile else ""
    if "L;I" in raw_mode or "1;I" in raw_mode:
        raise UnreadableImageError(
            "a TIFF mask in which 0 is white, which is read inverted; make it anew as PNG"
        )
    if "L;2" in raw_mode or "L;4" in raw_mode:
        raise UnreadableImageError(
            "a grey mask of 2 or 4 bits, whose values are levels of grey and not labels; save it with 8 bits"
        )


def palette_colours(path: Path) -> dict[int, tuple[int, ...]]:
    """The colours (red, green, blue) of the values in a palette image; none in other and in broken files."""
    try:
        with Image.open(path) as image:
            used = image.getcolors() if image.mode == "P" else None
            colours = np.array(image.getpalette("RGB") or []).reshape(-1, 3)
    except Exception:  # of broken files, decoders raise nearly anything; whoever reads the labels says so
        return {}
    return {value: tuple(colours[value].tolist()) for _, value in used or [] if value < len(colours)}


class LabelMap:
    """From the values in a data set's masks to the labels of its classes.

    Args:
        labels: value to label; ``IGNORE`` for values that stand for no class. Others are unknown.
        own: the masks are the user's own, and errors say which settings give their values a meaning.

    Examples:
        >>> import numpy as np
        >>> from cbsa_torch.images import IGNORE, LabelMap
        >>> LabelMap({0: 0, 128: 1, 255: IGNORE})(np.array([0, 128, 255]))
        array([ 0,  1, -1])
    """

    def __init__(self, labels: Mapping[int, int], *, own: bool = False) -> None:
        self.labels, self.own = dict(labels), own
        self._table = np.full(max(self.labels) + 1, _UNKNOWN, dtype=np.int64)
        self._table[list(self.labels)] = list(self.labels.values())

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """The labels of values (any shape), int64.

        Raises:
            UnreadableImageError: names the values that are unknown and how many pixels have them.
        """
        inside = (values >= 0) & (values < len(self._table))
        labels = self._table[np.where(inside, values, 0)]
        bad = ~inside | (labels == _UNKNOWN)
        if bad.any():
            raise UnreadableImageError(self._complaint(values, bad))
        return labels

    def _complaint(self, values: np.ndarray, bad: np.ndarray) -> str:
        unknown, counts = np.unique(values[bad], return_counts=True)
        listed = [f"{value} ({count} pixel(s))" for value, count in zip(unknown, counts, strict=True)]
        known = sorted(self.labels)
        allowed = f"{known[0]} to {known[-1]}" if len(known) == known[-1] - known[0] + 1 else str(known)
        hint = self._hint(np.unique(values).tolist()) if self.own else ""
        return f"unknown label {some_of(listed)}; known are {allowed}{hint}"

    def _hint(self, found: list[int]) -> str:
        """What the values of a mask look like, and the setting for that."""
        classes = len({label for label in self.labels.values() if label != IGNORE})
        hint = ""
        if classes == 2 and set(found) <= {0, 255}:
            hint = "; this looks like a binary mask: if 255 is the second class, set data.mask_values to 0 255"
        elif 1 < len(found) == classes:
            values = " ".join(map(str, found))
            hint = (
                "; it has as many values as there are classes: if they are these, in the order of classes.txt, "
                f"set data.mask_values to {values}"
            )
        if 255 in found and IGNORE not in self.labels.values():
            only, else_lost = ("only if", " (no such pixel is trained on then)") if hint else ("if", "")
            hint += f"; {only} 255 stands for no class, set data.ignore_label to 255{else_lost}"
        return hint


def consecutive_labels(count: int, first: int, ignored: Sequence[int]) -> LabelMap:
    """Labels 0 to ``count`` - 1 for the values from ``first`` on, and ``IGNORE`` for those in ``ignored``."""
    return LabelMap({**{first + i: i for i in range(count)}, **dict.fromkeys(ignored, IGNORE)})


def labels_from_colours(
    mask: str | Path | Image.Image, colours: Mapping[tuple[int, int, int], int]
) -> Image.Image:
    """Turn a mask whose colours stand for classes into one of labels, to be saved as PNG.

    Args:
        mask: the picture or its file.
        colours: (red, green, blue), each 0 to 255, to the label, 0 to 255.

    Raises:
        DataError: a colour that is not listed, or a label that does not fit.

    Examples:
        >>> from PIL import Image
        >>> from cbsa_torch.images import labels_from_colours
        >>> mask = labels_from_colours(Image.new("RGB", (2, 2), (255, 0, 0)), {(0, 0, 0): 0, (255, 0, 0): 1})
        >>> mask.getpixel((0, 0))  # then mask.save("mask.png")
        1
    """
    picture = mask if isinstance(mask, Image.Image) else Image.open(mask)
    pixels = np.asarray(upright(picture).convert("RGB")).astype(np.int64)
    codes = (pixels[..., 0] << 16) | (pixels[..., 1] << 8) | pixels[..., 2]
    labels = np.full(codes.shape, -1)
    for (red, green, blue), label in colours.items():
        if not 0 <= label <= 255:
            raise DataError(f"label {label} of colour {(red, green, blue)} is not in 0 to 255")
        labels[codes == (red << 16 | green << 8 | blue)] = label
    if (labels < 0).any():
        y, x = np.argwhere(labels < 0)[0]
        raise DataError(
            f"colour {tuple(pixels[y, x].tolist())} at row {y}, column {x} is not listed in colours "
            f"({int((labels < 0).sum())} pixel(s) have unlisted colours)"
        )
    return Image.fromarray(labels.astype(np.uint8))
