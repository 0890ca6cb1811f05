"""Decoding: every kind of image becomes 8-bit grey or colour as it looks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cbsa_torch.images.decode import convert, read_image_file
from cbsa_torch.images.errors import UnreadableImageError
from cbsa_torch.images.masks import read_mask_file


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def read(path: Path, mode: str) -> list:
    image = read_image_file(path, mode)
    assert image.mode == mode
    return np.asarray(image).tolist()


GREY_16 = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "grey.pgm", "32_bits.tif"])
def test_16_bit_grey_keeps_its_high_byte(tmp_path, name):
    path = saved(
        tmp_path / name, Image.fromarray(GREY_16.astype(np.int32 if name.startswith("32") else np.uint16))
    )
    assert read(path, "L") == [[0, 0, 1, 128, 255]]
    assert read(path, "RGB") == [[[v] * 3 for v in (0, 0, 1, 128, 255)]]


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_the_byte_order_of_16_bits_makes_no_difference(mode):
    order = ">" if mode.endswith("B") else "<"
    image = Image.frombytes(mode, (5, 1), GREY_16.astype(f"{order}u2").tobytes())
    assert np.asarray(convert(image, "L")).tolist() == [[0, 0, 1, 128, 255]]


def test_floats_are_0_to_1(tmp_path):
    values = np.array([[0, 0.25, 0.5, 0.999, 1]], dtype=np.float32)
    assert read(saved(tmp_path / "f.tif", Image.fromarray(values)), "L") == [[0, 64, 128, 255, 255]]


@pytest.mark.parametrize(
    "values", [*(np.float32([[v, 1]]) for v in (1.5, -0.1, np.nan)), np.int32([[65536]]), np.int32([[-1]])]
)
def test_values_without_an_agreed_scale_are_refused(tmp_path, values):
    path = saved(tmp_path / "x.tif", Image.fromarray(values))
    with pytest.raises(UnreadableImageError, match="some lie outside"):
        read_image_file(path, "RGB")


# colours of four pixels: transparent red, half red, opaque red, opaque white; over 128
DRAWING = [[[255, 0, 0, 0], [255, 0, 0, 128], [255, 0, 0, 255], [255, 255, 255, 255]]]
OVER_GREY = [[[128, 128, 128], [192, 64, 64], [255, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
def test_transparency_is_laid_over_mid_grey(tmp_path, name):
    options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
    path = saved(tmp_path / name, Image.fromarray(np.array(DRAWING, dtype=np.uint8)), **options)
    np.testing.assert_allclose(read(path, "RGB"), OVER_GREY, atol=1)
    pixels = np.array([[[0, 0], [255, 0], [0, 255], [255, 255], [255, 128]]], dtype=np.uint8)
    path = saved(tmp_path / "la.png", Image.fromarray(pixels, "LA"))
    np.testing.assert_allclose(read(path, "L"), [[128, 128, 0, 255, 192]], atol=1)


def palette() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    return image


@pytest.mark.parametrize(
    ("name", "options", "middle"),
    [
        ("p.png", {}, [0, 255, 0]),
        ("p.png", {"transparency": 1}, [128] * 3),
        ("p.png", {"transparency": bytes([255, 0, 255])}, [128] * 3),
        ("p.gif", {"transparency": 1}, [128] * 3),
    ],
)
def test_palette_images_have_their_colours_and_transparent_entries_are_mid_grey(
    tmp_path, name, options, middle
):
    path = saved(tmp_path / name, palette(), **options)
    assert read(path, "RGB") == [[[255, 0, 0], middle, [0, 0, 255]]]


@pytest.mark.parametrize(
    ("mode", "colours", "key"), [("RGB", [(1, 2, 3), (9, 9, 9)], (1, 2, 3)), ("L", [7, 9], 7)]
)
def test_a_transparent_colour_is_mid_grey(tmp_path, mode, colours, key):
    image = Image.new(mode, (2, 1))
    image.putdata(colours)
    path = saved(tmp_path / "t.png", image, transparency=key)
    assert read(path, "RGB") == [[[128] * 3, [9] * 3]]


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA"])
def test_rare_modes_with_alpha_are_converted(mode):
    source = Image.new("LA" if mode == "La" else "RGBA", (2, 2))
    image = Image.new("PA", (2, 2)) if mode == "PA" else source.convert(mode)
    for wanted in ("L", "RGB"):
        assert convert(image, wanted).mode == wanted


@pytest.mark.parametrize("name", ["c.jpg", "c.tif"])
def test_cmyk_is_not_inverted(tmp_path, name):
    """Cyan ink is what is not red. Pillow writes JPEGs inverted with Adobe's marker, as Photoshop does."""
    ink = {"c": (255, 0, 0, 0), "k": (0, 0, 0, 255), "none": (0, 0, 0, 0)}
    image = Image.new("CMYK", (24, 8), ink["none"])
    image.paste(ink["c"], (0, 0, 8, 8))
    image.paste(ink["k"], (8, 0, 16, 8))
    path = saved(tmp_path / name, image)
    if name == "c.jpg":
        with Image.open(path) as opened:
            assert "adobe" in opened.info
    row = np.asarray(read(path, "RGB"))[4, [4, 12, 20]]
    np.testing.assert_allclose(row, [[0, 255, 255], [0, 0, 0], [255, 255, 255]], atol=3)
    assert read(path, "L")[4][20] > 250


def test_one_bit_grey_and_colour_become_each_other(tmp_path):
    image = Image.new("1", (2, 1))
    image.putdata([0, 255])
    path = saved(tmp_path / "1.png", image)
    assert read(path, "L") == [[0, 255]]
    assert read(path, "RGB") == [[[0] * 3, [255] * 3]]
    path = saved(tmp_path / "l.png", Image.new("L", (1, 1), 77))
    assert read(path, "RGB") == [[[77, 77, 77]]]
    path = saved(tmp_path / "rgb.png", Image.new("RGB", (1, 1), (100, 200, 50)))
    assert read(path, "L") == [[153]]  # 0.299 * 100 + 0.587 * 200 + 0.114 * 50 = 153.0


def test_of_an_animation_the_first_picture_is_read(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read(tmp_path / "a.gif", "RGB") == [[[255, 0, 0]] * 4] * 4


CORNERS = np.arange(6).reshape(2, 3) * 40
"""The image as it is stored; what the EXIF orientation makes of it is in UPRIGHT."""
UPRIGHT = {
    1: CORNERS,
    2: CORNERS[:, ::-1],
    3: CORNERS[::-1, ::-1],
    4: CORNERS[::-1],
    5: CORNERS.T,
    6: CORNERS[::-1].T,
    7: CORNERS[::-1, ::-1].T,
    8: CORNERS[:, ::-1].T,
}


@pytest.mark.parametrize("kind", ["png", "webp", "tif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_and_masks_are_turned_as_the_orientation_says(tmp_path, kind, orientation):
    """By the standard: where row 0 and column 0 of what is stored lie in the picture."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(CORNERS.astype(np.uint8))
    options = {"exif": exif, **({"lossless": True} if kind == "webp" else {})}
    path = saved(tmp_path / f"o.{kind}", image.convert("RGB") if kind == "webp" else image, **options)
    assert read(path, "L") == UPRIGHT[orientation].tolist()
    once = read_image_file(path, "L")
    assert np.array_equal(convert(once, "L"), once)  # not turned again
    if kind != "webp":
        assert read_mask_file(path).tolist() == UPRIGHT[orientation].tolist()


@pytest.mark.parametrize(
    "data", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12", b"Exif\0\0" + b"\xff" * 40]
)
def test_damaged_metadata_and_unknown_orientations_turn_nothing(tmp_path, data):
    image = Image.fromarray(CORNERS.astype(np.uint8))
    assert read(saved(tmp_path / "o.png", image, exif=data), "L") == CORNERS.tolist()
    exif = Image.Exif()
    exif[0x0112] = 9
    assert read(saved(tmp_path / "o.png", image, exif=exif), "L") == CORNERS.tolist()


def test_an_open_file_is_read_like_its_path(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)))
    with path.open("rb") as file:
        assert np.asarray(read_image_file(file, "RGB")).tolist() == read(path, "RGB")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        (b"", "not an image, or of a kind that Pillow does not know"),
        (b"\x89PNG\r\n\x1a\nbroken", "not an image"),
    ],
)
def test_the_reason_is_one_line_without_the_name(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UnreadableImageError, match=reason) as caught:
        read_image_file(tmp_path / "x.png", "RGB")
    assert "x.png" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
def test_damage_anywhere_is_refused_or_read_but_nothing_else(tmp_path, kind):
    """Cut at 40 places and with 40 bytes changed: an image or one known error."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
    whole = saved(tmp_path / "whole", Image.fromarray(pixels), format=kind).read_bytes()
    refused = 0
    for i in range(80):
        place = int(generator.integers(0, len(whole)))
        changed = whole[:place] if i < 40 else whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
        (tmp_path / "damaged").write_bytes(changed)
        try:
            assert read_image_file(tmp_path / "damaged", "RGB").mode == "RGB"
        except UnreadableImageError:
            refused += 1
    assert refused >= 20
