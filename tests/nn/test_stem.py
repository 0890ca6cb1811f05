"""Convolutional and linear patch embeddings."""

import pytest
import torch
from torch import nn

from cbsa_torch.nn import ConvStem, LinearStem
from tests.helpers.compare import assert_close


@pytest.mark.parametrize(
    ("patch_size", "convolutions", "grid"),
    [(16, 4, (2, 4)), (8, 3, (4, 7)), (2, 1, (15, 25)), (1, 1, (30, 50))],
)
def test_stem_takes_any_size(patch_size, convolutions, grid):
    stem = ConvStem(3, 32, patch_size)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in stem.modules()) == convolutions
    assert stem(torch.randn(2, 3, 30, 50)).shape == (2, 32, *grid)
    assert stem.grid_size((30, 50)) == grid


def test_stem_has_gradients_per_image():
    stem = ConvStem(3, 8, 4).double().eval()
    images, weight = torch.randn(2, 3, 9, 6).double(), torch.randn(8, 3, 2).double()

    def loss(parameters, image):
        return (torch.func.functional_call(stem, parameters, image[None])[0] * weight).sum()

    parameters = dict(stem.named_parameters())
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    for i, image in enumerate(images):
        expected = torch.autograd.grad(loss(parameters, image), tuple(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            assert_close(found[name][i], gradient, 1e-12)


def test_linear_stem_reads_patches_row_by_row_channels_last():
    stem = LinearStem(2, 8, 3).double()
    nn.init.normal_(stem.norm1.weight)
    nn.init.normal_(stem.norm2.bias)
    images = torch.randn(2, 2, 6, 9).double()
    out = stem(images)
    assert out.shape == (2, 8, 2, 3)
    assert stem.grid_size((6, 9)) == (2, 3)
    for b in range(2):
        for row in range(2):
            for column in range(3):
                patch = [
                    images[b, channel, 3 * row + y, 3 * column + x]
                    for y in range(3)
                    for x in range(3)
                    for channel in range(2)
                ]
                expected = stem.norm2(stem.proj(stem.norm1(torch.stack(patch))))
                assert_close(out[b, :, row, column], expected, 1e-12)


@pytest.mark.parametrize("size", [(15, 16), (16, 18), (7, 7)], ids=str)
def test_linear_stem_names_sizes_that_are_no_multiples(size):
    stem = LinearStem(3, 8, 4)
    message = f"multiples of patch_size 4 for a linear stem, got {size[0]} x {size[1]}"
    with pytest.raises(ValueError, match=message):
        stem(torch.zeros(1, 3, *size))
    with pytest.raises(ValueError, match=message):
        stem.grid_size(size)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: ConvStem(patch_size=12), ValueError, "patch_size must be a power of two, got 12"),
        (lambda: ConvStem(embed_dim=36), ValueError, r"embed_dim \(=36\) must be divisible by 8"),
        (lambda: ConvStem(in_chans=0), ValueError, "in_chans must be at least 1"),
        (
            lambda: ConvStem()(torch.zeros(2, 3, 8, 8).byte()),
            TypeError,
            "floating-point dtype, got torch.uint8",
        ),
        (
            lambda: ConvStem()(torch.zeros(2, 1, 8, 8)),
            ValueError,
            r"\(B, 3, height, width\), got \(2, 1, 8, 8\)",
        ),
        (lambda: LinearStem(patch_size=0), ValueError, "patch_size must be at least 1"),
        (lambda: LinearStem(embed_dim=8.0), TypeError, "embed_dim must be an int"),
        (lambda: LinearStem(3, 8, 4)(torch.zeros(1, 1, 8, 8)), ValueError, r"\(B, 3, height, width\)"),
        (lambda: LinearStem(3, 8, 4)(torch.zeros(1, 3, 8, 8).byte()), TypeError, "images must have a floating"),
    ],
)
def test_bad_stems_are_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
