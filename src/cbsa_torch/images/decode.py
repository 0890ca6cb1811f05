"""From an image file to 8-bit grey or colour pixels: one way for training, evaluation, prediction and maps.

Pillow decodes; this module decides what its ``convert`` would do silently and wrongly:

- Transparency (alpha, a transparent palette entry or colour) is laid over mid-grey, as the emoji are;
  ``convert`` would drop it and show whatever colour lies beneath.
- 16-bit grey keeps its high byte, as Pillow has it for 16-bit colour; ``convert`` would clip at 255. 32-bit
  integers are taken as 16-bit values in a larger type, floats as 0 to 1; beyond these ranges there is no
  agreed scale, and the image is refused.

- Images and masks are turned and mirrored as their EXIF orientation says, as viewers show them; Pillow does so
  for TIFF alone.

The rest is Pillow's: CMYK by its plain formula (Adobe's inverted JPEGs are put right by Pillow), grey from
colour by ITU-R 601, the first picture of an animation. As in torchvision and timm, colour profiles are not
applied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from cbsa_torch.images.errors import UnreadableImageError

MID_GREY = 128
"""Grey level behind what is transparent: neither black nor white drawings vanish."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What the values of the EXIF orientation ask for; 1 is upright."""
_SIDEWAYS = (5, 6, 7, 8)
"""Those that exchange height and width."""


def read_image_file(file: Any, mode: str) -> Image.Image:
    """Read all of an image.

    Args:
        file: a path, or a binary file object.
        mode: "L" (grey) or "RGB".

    Raises:
        UnreadableImageError: whatever is wrong with the file, or that it is not there.

    Examples:
        >>> from PIL import Image
        >>> from cbsa_torch.images import read_image_file
        >>> Image.new("RGBA", (8, 6)).save("clear.png")
        >>> image = read_image_file("clear.png", "RGB")
        >>> image.size, image.getpixel((0, 0))  # transparency over mid-grey
        ((8, 6), (128, 128, 128))
    """
    try:
        if isinstance(file, (str, Path)):
            # Opened here: of a file that it opens itself, Pillow may map pixels into memory, and a process
            # that reads a mapped file while it shrinks is killed.
            with Path(file).open("rb") as opened:
                return _read(opened, mode)
        return _read(file, mode)
    except Exception as error:  # of broken files, decoders raise nearly anything
        raise UnreadableImageError(reason(error)) from error


def read_image_size(file: Any) -> tuple[int, int]:
    """Height and width of the upright image in a binary file object, without decoding its pixels.

    Raises:
        UnreadableImageError: whatever is wrong with the file.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
            return (width, height) if _orientation(image) in _SIDEWAYS else (height, width)
    except Exception as error:  # of broken files, decoders raise nearly anything
        raise UnreadableImageError(reason(error)) from error


def _read(file: Any, mode: str) -> Image.Image:
    with Image.open(file) as image:
        return convert(image, mode)


def convert(image: Image.Image, mode: str) -> Image.Image:
    """An image of any kind as upright 8-bit grey (``mode`` "L") or colour ("RGB"); loads all pixels.

    Raises:
        ValueError: values without an agreed scale, or a colour space that Pillow cannot convert.

    Examples:
        >>> from PIL import Image
        >>> from cbsa_torch.images import convert
        >>> convert(Image.new("I;16", (8, 6), 65535), "L").getpixel((0, 0))  # the high byte
        255
    """
    converted = _to_mode(upright(image), mode)
    converted.info = {}  # what it says of orientation and transparency was done
    return converted


def upright(image: Image.Image) -> Image.Image:
    """Turned and mirrored as the EXIF orientation says; loads all pixels."""
    image.load()
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata raise nearly anything, and viewers pass over them
        return None


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _to_8_bit(image).convert(mode)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return _over_grey(image).convert(mode)
    return image.convert(mode)


def _to_8_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F":
        if not (values >= 0).all() or not (values <= 1).all():  # NaN is neither
            raise ValueError("floating-point pixels are read as 0 to 1, and some lie outside")
        return Image.fromarray(np.floor(values * 255 + 0.5).astype(np.uint8))
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("32-bit pixels are read as 0 to 65535, and some lie outside")
    return Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8))


def _over_grey(image: Image.Image) -> Image.Image:
    # Pillow cannot convert every mode to RGBA at once: La goes by LA, RGBa and PA directly
    drawing = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    background = Image.new("RGBA", drawing.size, (MID_GREY, MID_GREY, MID_GREY, 255))
    return Image.alpha_composite(background, drawing).convert("RGB")


def reason(error: BaseException) -> str:
    """Why an image cannot be read, in one line without its name."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of a kind that Pillow does not know"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
