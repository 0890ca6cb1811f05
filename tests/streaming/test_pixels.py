"""Images read in parts: axes, dtypes, files."""

import numpy as np
import pytest
import torch
from PIL import Image

from cbsa_torch.streaming import open_array, stream
from cbsa_torch.streaming.pixels import Pixels
from tests.helpers.streaming import MEAN, STD, as_batch, classifier, image

LIKE = torch.zeros(1, dtype=torch.float64)


def test_axes_and_dtypes_are_read_alike():
    pixels = image(9, 7)
    expected = as_batch(pixels)[:, :, 2:5]
    whole = pixels.astype(np.uint16) * 257  # of 65,535
    for array, channels in (
        (pixels, "last"),
        (np.moveaxis(pixels, 2, 0), "first"),
        (whole, "last"),
        (whole.astype(">u2"), "last"),
        (pixels / 255, "last"),
    ):
        found = Pixels(array, channels, 3, MEAN, STD).read(slice(2, 5), LIKE)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_one_channel_needs_no_axis():
    grey = image(9, 7)[..., 0]
    for array, channels in ((grey, "last"), (grey, "first"), (grey[None], "first"), (grey[..., None], "last")):
        found = Pixels(array, channels, 1, (), ()).read(slice(1, 3), LIKE)
        assert torch.equal(found[0, 0], torch.from_numpy(grey[1:3] / 255))


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (
            np.zeros((9, 7, 4)),
            ValueError,
            r"source must have shape \(height, width, channels\).* got \(9, 7, 4\)",
        ),
        (np.zeros((9, 7)), ValueError, r"3 channels"),
        (np.zeros((0, 7, 3)), ValueError, r"got \(0, 7, 3\)"),
        (np.zeros((9, 7, 3), complex), TypeError, "complex128"),
        (np.zeros((9, 7, 3), np.longdouble), TypeError, "of at most 64 bits"),
        ([[1.0]], TypeError, "got list"),
    ],
)
def test_arrays_that_are_no_image(array, error, message):
    with pytest.raises(error, match=message):
        Pixels(array, "last", 3, (), ())


class Short:
    """A file that is cut off: it gives fewer rows than it says."""

    shape, dtype = (9, 7, 3), np.dtype("uint8")

    def __getitem__(self, index):
        return np.zeros(self.shape, self.dtype)[:6][index]


def test_a_source_that_gives_less_than_it_says(tmp_path):
    with pytest.raises(ValueError, match="source gave"):
        stream(classifier(), Short(), tmp_path / "out")
    with pytest.raises(ValueError, match="source has masked numbers: fill them first"):
        stream(classifier(), np.ma.masked_less(image(9, 7), 100), tmp_path / "out")


def test_numbers_that_are_not_finite_spread_as_in_memory(tmp_path):
    """And the picture is black."""
    pixels = image(20, 20).astype(np.float32)
    pixels[3, 4] = np.nan
    result = stream(classifier(), pixels, tmp_path / "out", results=["logits", "map"])
    assert result.logits.isnan().all()
    assert not np.asarray(Image.open(result.files["picture"])).any()


def test_a_file_is_mapped_and_known_again(tmp_path):
    pixels = image(20, 20)
    np.save(tmp_path / "image.npy", pixels)
    array = open_array(tmp_path / "image.npy")
    assert isinstance(array, np.memmap)
    known = Pixels(array, "last", 3, (), ()).fingerprint()
    assert known == Pixels(open_array(tmp_path / "image.npy"), "last", 3, (), ()).fingerprint()
    np.save(tmp_path / "image.npy", pixels)  # written again: it may be another image
    assert known != Pixels(open_array(tmp_path / "image.npy"), "last", 3, (), ()).fingerprint()
