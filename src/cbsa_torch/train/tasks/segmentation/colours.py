"""Masks as pictures: a colour for each class, laid over the image, with a legend."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cbsa_torch._core.files import write_atomically
from cbsa_torch._core.text import readable
from cbsa_torch.images import IGNORE

IGNORED = (224, 224, 192)
"""Colour of ignored pixels: VOC's for label 255."""
_SMALLEST_SIDE, _LINE, _SWATCH, _GAP = 256, 20, 12, 8
_COLUMN_CHARACTERS = 28
_FEWEST_ROWS = 8


def palette(count: int) -> np.ndarray:
    """Colours (count, 3) uint8 of classes: those of PASCAL VOC, of which there are 255 (then they repeat).

    Bit i of a label becomes bit 7 - i // 3 of the colour's channel i % 3. Label 0, often the background, is
    black; a class keeps its colour as others are added.

    Examples:
        >>> from cbsa_torch.train.tasks.segmentation import palette
        >>> palette(3).tolist()
        [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    """
    labels = np.arange(count) % 255
    colours = np.zeros((count, 3), dtype=np.uint8)
    for i in range(8):
        colours[:, i % 3] |= ((labels >> i & 1) << (7 - i // 3)).astype(np.uint8)
    return colours


def colour_mask(mask: np.ndarray, count: int) -> np.ndarray:
    """A mask (height, width) of labels of ``count`` classes as colours (height, width, 3) uint8.

    Ignored pixels are ``IGNORED``.

    Examples:
        >>> import numpy as np
        >>> from cbsa_torch.train.tasks.segmentation import colour_mask
        >>> colour_mask(np.array([[0, 1]]), 2).tolist()
        [[[0, 0, 0], [128, 0, 0]]]
    """
    colours = np.concatenate([palette(count), np.array([IGNORED], dtype=np.uint8)])
    return colours[np.where(mask == IGNORE, count, mask)]


def write_coloured_mask(
    image: Image.Image, mask: np.ndarray | Tensor, class_names: Sequence[str], path: str | Path
) -> None:
    """Write a PNG: the image, the mask laid over it, and a legend of the classes that occur, the largest first.

    Args:
        image: any mode and size.
        mask: (height, width) integers of the image's size, labels or ``IGNORE`` (-1).
        class_names: in the order of the labels.
        path: the file; replaced at once, or not at all.

    Raises:
        ValueError: a mask of another size, or labels without a class.

    Examples:
        >>> import numpy as np
        >>> from PIL import Image
        >>> from cbsa_torch.train.tasks.segmentation import write_coloured_mask
        >>> image, mask = Image.new("RGB", (64, 48)), np.ones((48, 64), int)
        >>> write_coloured_mask(image, mask, ["ground", "cat"], "shown.png")
    """
    labels = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if labels.shape != image.size[::-1]:
        raise ValueError(
            f"mask must have the image's (height, width) = {image.size[::-1]}, got shape {labels.shape}"
        )
    if labels.dtype.kind not in "iu":
        raise ValueError(f"mask must hold integers, got {labels.dtype}")
    if labels.size and (labels.min() < IGNORE or labels.max() >= len(class_names)):
        raise ValueError(
            f"mask must hold labels in [{IGNORE}, {len(class_names) - 1}] for {len(class_names)} class(es), "
            f"got {labels.min()} to {labels.max()}"
        )
    buffer = io.BytesIO()
    _picture(image.convert("RGB"), labels.astype(np.int64), list(class_names)).save(buffer, "PNG")
    write_atomically(Path(path), buffer.getvalue())


def _picture(image: Image.Image, labels: np.ndarray, class_names: list[str]) -> Image.Image:
    coloured = Image.fromarray(colour_mask(labels, len(class_names)))
    panels = [image, Image.blend(image.convert("L").convert("RGB"), coloured, 0.6)]
    # small images are enlarged, for the legend to fit and single pixels to be seen
    factor = max(1, -(-_SMALLEST_SIDE // max(image.size)))
    width, height = image.size[0] * factor, image.size[1] * factor
    panels = [panel.resize((width, height), Image.Resampling.NEAREST) for panel in panels]
    legend = _legend(labels, class_names, height)
    page_size = 2 * width + legend.width + 4 * _GAP, max(height, legend.height) + 2 * _GAP
    page = Image.new("RGB", page_size, "white")
    for i, panel in enumerate(panels):
        page.paste(panel, (_GAP + i * (width + _GAP), _GAP))
    page.paste(legend, (2 * width + 3 * _GAP, _GAP))
    return page


def _legend(labels: np.ndarray, class_names: list[str], height: int) -> Image.Image:
    """Entries in columns of the height of the image, or of a few entries where it is flat."""
    values, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    colours = {IGNORE: IGNORED, **{i: tuple(c) for i, c in enumerate(palette(len(class_names)).tolist())}}
    names = {IGNORE: "(ignored)", **dict(enumerate(class_names))}
    rows = max(_FEWEST_ROWS, height // _LINE)
    font = ImageFont.load_default(size=13)
    entries = [
        (colours[int(values[i])], f"{_short(names[int(values[i])])}  {100 * counts[i] / labels.size:.1f} %")
        for i in order
    ]
    widest = max((font.getlength(text) for _, text in entries), default=0)
    column = int(widest) + _SWATCH + 3 * _GAP
    legend = Image.new(
        "RGB", (column * max(1, -(-len(entries) // rows)), min(rows, len(entries)) * _LINE), "white"
    )
    draw = ImageDraw.Draw(legend)
    for i, (colour, text) in enumerate(entries):
        x, y = column * (i // rows), _LINE * (i % rows)
        draw.rectangle((x, y + 3, x + _SWATCH, y + 3 + _SWATCH), fill=colour)
        draw.text((x + _SWATCH + _GAP, y + 1), text, fill="black", font=font)
    return legend


def _short(name: str) -> str:
    name = readable(name)
    return name if len(name) <= _COLUMN_CHARACTERS else f"{name[: _COLUMN_CHARACTERS - 1]}…"
