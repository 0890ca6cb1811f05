"""The linear stem and the residual block."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cbsa_torch.nn import MSSA, LinearStem, ResidualBlock
from tests.helpers.compare import assert_close
from tests.helpers.mixers import DIM, HEADS, gradients


def test_residual_block_is_its_equations():
    block = ResidualBlock(DIM, MSSA(DIM, HEADS), mlp_ratio=1.5).double()
    assert [tuple(p.shape) for p in block.mlp.parameters()] == [(18, 12), (18,), (12, 18), (12,)]
    nn.init.normal_(block.norm1.weight)
    nn.init.normal_(block.norm2.bias)
    x = torch.randn(2, 9, DIM).double()
    mask = torch.arange(9) < torch.tensor([[9], [5]])

    def norm(layer, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    y = x + block.attn(norm(block.norm1, x), token_mask=mask)
    up, _, down = block.mlp
    expected = y + F.gelu(norm(block.norm2, y) @ up.weight.T + up.bias) @ down.weight.T + down.bias
    assert_close(block(x, None, mask), expected, 1e-12)
    assert all(g.abs().max() > 0 for g in gradients(block, x)[2].values())
    with pytest.raises(ValueError, match="mlp_ratio must be positive"):
        ResidualBlock(DIM, MSSA(DIM, HEADS), mlp_ratio=0.0)


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
        (lambda: LinearStem(patch_size=0), ValueError, "patch_size must be at least 1"),
        (lambda: LinearStem(embed_dim=8.0), TypeError, "embed_dim must be an int"),
        (lambda: LinearStem(3, 8, 4)(torch.zeros(1, 1, 8, 8)), ValueError, r"\(B, 3, height, width\)"),
        (lambda: LinearStem(3, 8, 4)(torch.zeros(1, 3, 8, 8).byte()), TypeError, "images must have a floating"),
    ],
)
def test_bad_linear_stems_are_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
