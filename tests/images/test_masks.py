"""Masks: every kind of file gives the labels it holds, or a reason why not; no label is made up."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cbsa_torch.images import (
    IGNORE,
    DataError,
    LabelMap,
    UnreadableImageError,
    labels_from_colours,
    read_foreground,
    read_mask_file,
)
from cbsa_torch.images.masks import consecutive_labels

LABELS = np.array([[0, 1, 2], [3, 254, 255]])


def saved(path, image, **options):
    image.save(path, **options)
    return path


def palette_image(labels):
    image = Image.fromarray(labels.astype(np.uint8)).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    return image


@pytest.mark.parametrize(
    ("name", "options"), [("m.png", {}), ("m.tif", {}), ("m.bmp", {}), ("m.png", {"transparency": 0})]
)
def test_palette_indices_are_labels_whatever_is_transparent(tmp_path, name, options):
    assert read_mask_file(saved(tmp_path / name, palette_image(LABELS), **options)).tolist() == LABELS.tolist()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_small_palettes_are_read_as_indices(tmp_path, bits):
    labels = np.arange(2**bits).reshape(2, -1)
    path = saved(tmp_path / "m.png", palette_image(labels), bits=bits)
    assert read_mask_file(path).tolist() == labels.tolist()


@pytest.mark.parametrize(
    ("dtype", "largest"), [(bool, 1), (np.uint8, 255), (np.uint16, 65535), (np.int32, 70000)]
)
def test_grey_levels_are_labels(tmp_path, dtype, largest):
    got = read_mask_file(saved(tmp_path / "m.tif", Image.fromarray(np.array([[0, 1, largest]], dtype=dtype))))
    assert got.dtype == np.int64
    assert got.tolist() == [[0, 1, largest]]


def four_bit_grey_png():
    """Grey of 4 bits, which Pillow reads but does not write: the header of a one-pixel PNG, changed."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 1, 4, 0, 0, 0, 0)
    pixels = zlib.compress(bytes([0, 0x01]))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_grey_of_4_bits_which_pillow_stretches_is_refused(tmp_path):
    path = tmp_path / "m.png"
    path.write_bytes(four_bit_grey_png())
    with Image.open(path) as image:
        assert np.asarray(image).tolist() == [[0, 17]]  # else the refusal is no longer needed
    with pytest.raises(UnreadableImageError, match="2 or 4 bits"):
        read_mask_file(path)


@pytest.mark.parametrize(
    ("content", "read"),
    [
        (b"P5 3 1 2\n\x00\x01\x02", [[0, 128, 255]]),
        (b"P5 2 1 1\n\x00\x01", [[0, 255]]),
        (b"P4 2 1\n\x40", [[True, False]]),
    ],
    ids=["stretched", "two", "inverted"],
)
def test_small_pgm_and_pbm_are_refused(tmp_path, content, read):
    path = tmp_path / "m.pgm"
    path.write_bytes(content)
    with Image.open(path) as image:
        assert np.asarray(image).tolist() == read  # else the refusal is no longer needed
    with pytest.raises(UnreadableImageError, match="PBM or PGM mask of fewer than 8 bits"):
        read_mask_file(path)
    path.write_bytes(b"P5 3 1 255\n\x00\x01\x02")
    assert read_mask_file(path).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("bits", "pixels", "read"), [(8, b"\0\1", [[255, 254]]), (1, b"\x40", [[True, False]])]
)
def test_tiff_in_which_0_is_white_is_refused(tmp_path, bits, pixels, read):
    # width, height, bits, no compression, 0 is white, where the pixels are, their rows and bytes
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: 0, 273: 8, 278: 1, 279: len(pixels)}
    folder = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    path = tmp_path / "m.tif"
    path.write_bytes(
        struct.pack("<2sHI2s", b"II", 42, 10, pixels) + struct.pack("<H", len(tags)) + folder + bytes(4)
    )
    with Image.open(path) as image:
        assert np.asarray(image).tolist() == read  # else the refusal is no longer needed
    with pytest.raises(UnreadableImageError, match="a TIFF mask in which 0 is white, which is read inverted"):
        read_mask_file(path)


@pytest.mark.parametrize(
    ("name", "mode", "reason"),
    [
        ("m.png", "RGB", r"mode RGB, where one number per pixel is expected.*labels_from_colours"),
        ("m.png", "RGBA", "mode RGBA"),
        ("m.png", "LA", "mode LA"),
        ("m.tif", "F", "mode F"),
        ("m.tif", "CMYK", "mode CMYK"),
        ("m.gif", "P", "GIF, whose writers renumber palettes"),
        ("m.jpg", "L", "JPEG, whose compression changes labels"),
        ("m.webp", "RGB", "WEBP, whose compression changes labels"),
        ("jpeg.tif", "L", "TIFF with jpeg, whose compression changes labels"),
        ("pages.tif", "L", "a mask of 2 pages, of which only one would be read"),
        ("pages.png", "L", "a mask of 2 pages"),
    ],
)
def test_what_does_not_hold_labels_is_refused_with_advice(tmp_path, name, mode, reason):
    pages = {"save_all": True, "append_images": [Image.new(mode, (4, 4), 1)]}
    options = {"jpeg.tif": {"compression": "jpeg"}, "pages.tif": pages, "pages.png": pages}
    path = saved(tmp_path / name, Image.new(mode, (4, 4)), **options.get(name, {}))
    with pytest.raises(UnreadableImageError, match=reason) as caught:
        read_mask_file(path)
    assert "\n" not in str(caught.value)


def test_a_broken_mask_is_refused(tmp_path):
    path = saved(tmp_path / "m.png", palette_image(np.zeros((99, 99))))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UnreadableImageError, match="truncated"):
        read_mask_file(path)
    path.write_text("no mask")
    with pytest.raises(UnreadableImageError, match="not an image"):
        read_mask_file(path)


def test_foreground_is_what_is_not_0_and_255_is_void_in_a_palette(tmp_path):
    grey = saved(tmp_path / "grey.png", Image.fromarray(LABELS.astype(np.uint8)))
    foreground, valid = read_foreground(grey)
    assert foreground.tolist() == [[False, True, True], [True, True, True]]
    assert valid is None
    foreground, valid = read_foreground(saved(tmp_path / "palette.png", palette_image(LABELS)))
    assert foreground.tolist() == [[False, True, True], [True, True, False]]
    assert valid.tolist() == [[True, True, True], [True, True, False]]


@pytest.mark.parametrize(
    ("labels", "values", "message"),
    [
        (consecutive_labels(3, 0, []), [0, 3, 3], r"unknown label 3 \(2 pixel\(s\)\); known are 0 to 2$"),
        (
            LabelMap({0: 0, 1: 1}, own=True),
            [0, 255],
            "binary mask: if 255 is the second class, set data.mask_values to 0 255; only if",
        ),
        (
            LabelMap({0: 0, 1: 1, 2: 2}, own=True),
            [0, 255],
            "to 2; if 255 stands for no class, set data.ignore_label to 255",
        ),
        (LabelMap({0: 0, 1: 1, 2: 2}, own=True), [0, 90, 200], "set data.mask_values to 0 90 200$"),
        (LabelMap({0: 0, 1: 1, 255: IGNORE}, own=True), [0, 255, 7], "known are .0, 1, 255.$"),
        (consecutive_labels(3, 0, [255]), [3, 300, -1], r"-1 \(1 .*, 3 .*, 300 .*; known are \[0, 1, 2, 255\]"),
        (consecutive_labels(2, 0, []), list(range(20)), r"6 \(1 pixel\(s\)\) and 13 more"),
        (LabelMap({0: 0, 2: 1}), [1], "unknown label 1"),
    ],
)
def test_unknown_labels_are_named(labels, values, message):
    with pytest.raises(UnreadableImageError, match=message):
        labels(np.array(values))


def test_colours_become_labels(tmp_path):
    pixels = np.array([[[255, 0, 0], [0, 0, 255]], [[0, 0, 0], [255, 0, 0]]], dtype=np.uint8)
    path = saved(tmp_path / "m.png", Image.fromarray(pixels))
    colours = {(0, 0, 0): 0, (255, 0, 0): 1, (0, 0, 255): 255}
    converted = labels_from_colours(path, colours)
    assert read_mask_file(saved(tmp_path / "l.png", converted)).tolist() == [[1, 255], [0, 1]]
    del colours[0, 0, 255]
    with pytest.raises(DataError, match=r"colour \(0, 0, 255\) at row 0, column 1 is not listed .* \(1 pixel"):
        labels_from_colours(path, colours)
    with pytest.raises(DataError, match="label 256 of colour"):
        labels_from_colours(path, {(0, 0, 0): 256})
