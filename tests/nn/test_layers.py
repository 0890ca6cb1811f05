"""ISTA, the stem and the block."""

import pytest
import torch

from cbsa_torch import CBSA, ISTA
from cbsa_torch.nn import ConvStem, WhiteBoxBlock
from tests.helpers import golden
from tests.helpers.compare import assert_close


def test_block_has_parity_with_one_official_layer():
    data, _ = golden.load("block_cbsa_ista")
    block = WhiteBoxBlock(32, CBSA(32, 4, layout="official"), dtype=torch.float64).double()
    prefix = "param.transformer.layers.0."
    mixer, feed_forward = f"{prefix}0.", f"{prefix}1."
    block.load_state_dict(
        {
            "norm1.weight": data[f"{mixer}norm.weight"],
            "norm1.bias": data[f"{mixer}norm.bias"],
            "attn.step_tokens": data[f"{mixer}fn.step_x"].flatten(),
            "attn.step_representatives": data[f"{mixer}fn.step_rep"].flatten(),
            "attn.qkv.weight": data[f"{mixer}fn.proj.weight"],
            "attn.proj.weight": data[f"{mixer}fn.to_out.weight"],
            "attn.proj.bias": data[f"{mixer}fn.to_out.bias"],
            "norm2.weight": data[f"{feed_forward}norm.weight"],
            "norm2.bias": data[f"{feed_forward}norm.bias"],
            "ista.weight": data[f"{feed_forward}fn.weight"],
        }
    )
    x = data["input"].requires_grad_()
    out = block(x)
    assert_close(out, data["output"], 1e-10)
    if "grad_output" in data:
        out.backward(data["grad_output"])
        assert_close(x.grad, data["grad_input"], 1e-10)


def test_ista_is_non_negative_and_has_one_weight():
    layer = ISTA(6, step_size=0.3, sparsity=0.2)
    assert (layer(torch.randn(2, 5, 6)) >= 0).all()
    assert [tuple(p.shape) for p in layer.parameters()] == [(6, 6)]
    assert "step_size=0.3" in repr(layer)


@pytest.mark.parametrize(
    ("patch_size", "convolutions", "grid"),
    [(16, 4, (2, 4)), (8, 3, (4, 7)), (2, 1, (15, 25)), (1, 1, (30, 50))],
)
def test_stem_takes_any_size(patch_size, convolutions, grid):
    stem = ConvStem(3, 32, patch_size)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in stem.modules()) == convolutions
    assert stem(torch.randn(2, 3, 30, 50)).shape == (2, 32, *grid)
    assert stem.grid_size((30, 50)) == grid


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 12}, "patch_size must be a power of two, got 12"),
        ({"embed_dim": 36}, r"embed_dim \(=36\) must be divisible by 8"),
        ({"in_chans": 0}, "in_chans must be at least 1"),
    ],
)
def test_bad_stems_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ConvStem(**options)


def test_stem_names_wrong_images():
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, height, width\), got \(2, 1, 8, 8\)"):
        ConvStem()(torch.zeros(2, 1, 8, 8))
