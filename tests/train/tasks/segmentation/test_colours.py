"""Coloured masks with a legend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from cbsa_torch.train.tasks.segmentation import IGNORE, colour_mask, palette, write_coloured_mask
from cbsa_torch.train.tasks.segmentation.colours import IGNORED


def names(count):
    return [f"class {i}" for i in range(count)]


def colours(image):
    return {tuple(c) for c in np.asarray(image).reshape(-1, 3).tolist()}


def test_colours_are_those_of_voc():
    many = palette(150)
    assert many.shape == (150, 3)
    assert many.dtype == np.uint8
    assert len({tuple(colour) for colour in palette(255).tolist()} | {IGNORED}) == 256
    # background, aeroplane, bicycle, bird, boat, ..., tvmonitor, as the devkit's colour map has them
    assert many[:5].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    assert many[20].tolist() == [0, 64, 128]
    assert (palette(20) == many[:20]).all()
    assert palette(0).shape == (0, 3)
    assert palette(256)[255].tolist() == [0, 0, 0]


def test_a_mask_is_coloured_pixel_by_pixel():
    coloured = colour_mask(np.array([[0, 2], [IGNORE, 1]]), 3)
    expected = palette(3)
    assert coloured.tolist() == [
        [expected[0].tolist(), expected[2].tolist()],
        [list(IGNORED), expected[1].tolist()],
    ]


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_the_picture_shows_the_classes_that_occur(tmp_path, kind, mode):
    mask = np.zeros((20, 30), dtype=np.int64)
    mask[:5] = 4
    mask[5] = IGNORE
    path = tmp_path / "new" / "m.png"
    write_coloured_mask(Image.new(mode, (30, 20)), kind(mask), names(6), path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        # enlarged nine times to at least 256 pixels, two panels and the legend beside
        assert picture.size[1] == 20 * 9 + 16
        assert picture.size[0] > 2 * 30 * 9
        legend = colours(picture.convert("RGB").crop((2 * 30 * 9 + 20, 0, *picture.size)))
    shown = [tuple(c) in legend for c in palette(6).tolist()]
    assert shown == [True, False, False, False, True, False]
    assert IGNORED in legend


@pytest.mark.parametrize(("size", "count", "from_column"), [((30, 20), 150, 0), ((400, 10), 8, 824)])
def test_a_legend_is_whole_in_columns_and_beside_a_flat_image(tmp_path, size, count, from_column):
    pixels = size[0] * size[1]
    mask = np.arange(pixels).reshape(size[::-1]) * count // pixels
    long = [f"a rather long name of class {i}" for i in range(count)]
    write_coloured_mask(Image.new("RGB", size), mask, long, tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as picture:
        assert picture.height >= 8 * 20
        shown = colours(picture.crop((from_column, 0, *picture.size)))
    assert {tuple(c) for c in palette(count).tolist()} <= shown


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((30, 20), int), r"\(height, width\) = \(20, 30\), got shape \(30, 20\)"),
        (np.full((20, 30), 6), r"labels in \[-1, 5\] for 6 class\(es\), got 6 to 6"),
        (np.zeros((20, 30)), "integers, got float64"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, mask, message):
    with pytest.raises(ValueError, match=message):
        write_coloured_mask(Image.new("RGB", (30, 20)), mask, names(6), tmp_path / "m.png")
    assert not list(tmp_path.iterdir())
