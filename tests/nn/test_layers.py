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
    official = {
        "norm1.weight": "0.norm.weight",
        "norm1.bias": "0.norm.bias",
        "attn.step_tokens": "0.fn.step_x",
        "attn.step_representatives": "0.fn.step_rep",
        "attn.qkv.weight": "0.fn.proj.weight",
        "attn.proj.weight": "0.fn.to_out.weight",
        "attn.proj.bias": "0.fn.to_out.bias",
        "norm2.weight": "1.norm.weight",
        "norm2.bias": "1.norm.bias",
        "ista.weight": "1.fn.weight",
    }

    def read(kind, name):
        tensor = data[f"{kind}.transformer.layers.0.{official[name]}"]
        return tensor.flatten() if ".step_" in name else tensor

    block.load_state_dict({name: read("param", name) for name in official})
    x = data["input"].requires_grad_()
    out = block(x)
    out.backward(data["grad_output"])
    assert_close(out, data["output"], 1e-10)
    assert_close(x.grad, data["grad_input"], 1e-10)
    for name, parameter in block.named_parameters():
        assert_close(parameter.grad, read("grad", name), 1e-10)


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


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"sparsity": -1.0}, ValueError, "sparsity must not be negative"),
        ({"step_size": "a"}, TypeError, "step_size must be a number"),
    ],
)
def test_bad_ista_is_named(options, kind, message):
    with pytest.raises(kind, match=message):
        ISTA(4, **options)


def test_stem_names_wrong_images():
    with pytest.raises(TypeError, match=r"images must have a floating-point dtype, got torch.uint8"):
        ConvStem()(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, height, width\), got \(2, 1, 8, 8\)"):
        ConvStem()(torch.zeros(2, 1, 8, 8))
