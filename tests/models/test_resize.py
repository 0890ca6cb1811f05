"""Resizing by matrices is PyTorch's."""

import pytest
import torch
from torch.nn import functional as F

from cbsa_torch.models.resize import _resize_any_size, resize
from tests.helpers.compare import assert_close


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(14, 9), (7, 30), (28, 3), (1, 1), (15, 8), (2, 100)])
def test_to_any_size(mode, size):
    maps = torch.randn(2, 3, 14, 9)
    expected = F.interpolate(maps, size, mode=mode, antialias=True)
    assert_close(_resize_any_size(maps, size, mode), expected, 3e-6)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(13, 1), (2, 1), (6, 1), (1, 1), (1, 6), (13, 5)])
@pytest.mark.parametrize("own", [(6, 7), (5, 1), (1, 5)])
def test_one_row_and_one_column_of_any_memory_format(own, size, mode):
    """PyTorch repeats the first row in a width of 1."""
    maps = torch.randn(2, 3, *own, dtype=torch.float64)
    expected = _resize_any_size(maps, size, mode)
    for given in (maps, maps.to(memory_format=torch.channels_last), maps.mT.contiguous().mT):
        assert_close(resize(given, size, mode), expected, 1e-12)
