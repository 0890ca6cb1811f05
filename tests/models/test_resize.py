"""Resizing by matrices is PyTorch's."""

import pytest
import torch
from torch.nn import functional as F

from cbsa_torch.models.resize import _resize_any_size
from tests.helpers.compare import assert_close


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(14, 9), (7, 30), (28, 3), (1, 1), (15, 8), (2, 100)])
def test_to_any_size(mode, size):
    maps = torch.randn(2, 3, 14, 9)
    expected = F.interpolate(maps, size, mode=mode, antialias=True)
    assert_close(_resize_any_size(maps, size, mode), expected, 3e-6)
