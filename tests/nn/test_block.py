"""The white-box layer and the residual one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cbsa_torch import CBSA
from cbsa_torch.nn import MSSA, ResidualBlock, WhiteBoxBlock
from tests.helpers import golden
from tests.helpers.compare import assert_close
from tests.helpers.mixers import DIM, HEADS, gradients


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


@pytest.mark.parametrize(
    ("options", "residual", "expected"),
    [({}, None, "input"), ({"step": "certified"}, None, "norm"), ({"step": "certified"}, "input", "input")],
)
def test_the_update_of_a_certified_step_is_added_to_the_norm(options, residual, expected):
    assert WhiteBoxBlock(DIM, CBSA(DIM, HEADS, **options), residual=residual).residual == expected


def test_a_module_around_a_certified_step_is_told_what_to_add_to():
    around = nn.Sequential(CBSA(DIM, HEADS, step="certified"))
    assert WhiteBoxBlock(DIM, around).residual == "input"
    assert WhiteBoxBlock(DIM, around, residual="norm").residual == "norm"


def test_what_a_block_keeps_for_the_backward_pass():
    """x, its norm, the tokens in their subspaces, their sum with the update, its norm, and the code."""
    block = WhiteBoxBlock(DIM, CBSA(DIM, HEADS, num_representatives=4, impl="tiled"))
    x, kept = torch.randn(2, 49, DIM, requires_grad=True), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        block(x)
    assert sum(t.numel() for t in kept.values() if t.numel() >= 2 * 49 * 4) == 6 * x.numel()


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


def test_the_update_is_added_to_the_input_or_to_its_norm():
    block, x = WhiteBoxBlock(DIM, MSSA(DIM, HEADS), residual="norm").double(), torch.randn(2, 9, DIM).double()
    nn.init.normal_(block.norm1.weight)
    normed = block.norm1(x)
    assert_close(block(x), block.ista(block.norm2(normed + block.attn(normed))), 1e-12)
    other = WhiteBoxBlock(DIM, block.attn).double()
    other.load_state_dict(block.state_dict())
    assert_close(other(x), block.ista(block.norm2(x + block.attn(normed))), 1e-12)
    with pytest.raises(ValueError, match="residual must be one of 'input', 'norm', got 'output'"):
        WhiteBoxBlock(DIM, MSSA(DIM, HEADS), residual="output")
