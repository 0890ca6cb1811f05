"""Orthonormal bases stay so, whatever happens to their parameter."""

import copy

import pytest
import torch
from torch import nn

from cbsa_torch import ops
from cbsa_torch.nn import MSSA
from cbsa_torch.nn.orthonormal import OrthonormalLinear
from tests.helpers.compare import assert_close
from tests.helpers.mixers import DIM, HEAD_DIM, HEADS, MIXERS, ORTHOGONAL, assert_orthonormal, merge, split


@pytest.mark.parametrize("name", ORTHOGONAL)
@pytest.mark.parametrize(
    ("optimizer", "decay", "head_dim"), [(torch.optim.SGD, 0.1, HEAD_DIM), (torch.optim.AdamW, 1e-4, 3)]
)
def test_bases_stay_orthonormal_in_training_with_decay_and_averaging(name, optimizer, decay, head_dim):
    layer = MIXERS[name](head_dim=head_dim)
    assert_orthonormal(layer)
    steps = optimizer(layer.parameters(), lr=0.1, weight_decay=decay)
    average, before = copy.deepcopy(layer), layer.qkv.weight.detach().clone()
    for _ in range(5):
        steps.zero_grad()
        x = torch.randn(4, 9, DIM)
        (layer(x) - x).square().mean().backward()
        steps.step()
        for mean, new in zip(average.parameters(), layer.parameters(), strict=True):
            mean.data.lerp_(new.data, 0.1)
    assert (layer.qkv.weight - before).abs().max() > 1e-3
    assert_orthonormal(layer)
    assert_orthonormal(average)


def test_orthonormal_bases_span_disjoint_subspaces():
    """U_i^T U_j = 0: with tied projections, what one head moves no other head sees."""
    layer = MSSA(DIM, HEADS, tied=True, orthogonal=True).double()
    x = torch.randn(2, 9, DIM).double()
    assert_close(layer(x) @ layer.qkv.weight.T, merge(ops.mssa(split(x @ layer.qkv.weight.T))), 1e-10)


def test_orthogonal_bases_in_half_precision_are_refused_at_any_time():
    layer = MSSA(12, 3, orthogonal=True).bfloat16()
    with pytest.raises(ValueError, match="orthogonal needs float32 or float64 parameters, got torch.bfloat16"):
        layer(torch.randn(1, 4, 12, dtype=torch.bfloat16))


def test_an_orthonormal_weight_is_kept_and_any_other_made_so():
    linear = OrthonormalLinear(7, 5, dtype=torch.float64)
    given = nn.init.orthogonal_(torch.empty(5, 7, dtype=torch.float64))
    linear.weight = given
    assert_close(linear.weight, given, 1e-14)
    assert_close(linear.parametrizations.weight.original, given, 1e-14)
    identity = torch.eye(5, dtype=torch.float64)
    for parameter in (torch.eye(5, 7), torch.zeros(5, 7), torch.ones(5, 7), 1e6 * torch.randn(5, 7)):
        linear.parametrizations.weight.original.data = parameter.double()
        assert_close(linear.weight @ linear.weight.mT, identity, 1e-14)
    linear.float()
    assert (linear.weight @ linear.weight.mT - identity).abs().max() < 1e-6


def test_a_layer_is_drawn_anew_with_its_bias():
    linear = OrthonormalLinear(7, 5, dtype=torch.float64)
    before = copy.deepcopy(linear)
    linear.reset_parameters()
    assert_close(linear.weight @ linear.weight.mT, torch.eye(5, dtype=torch.float64), 1e-14)
    assert (linear.weight - before.weight).abs().max() > 1e-3
    assert (linear.bias - before.bias).abs().max() > 1e-3


def test_gradients_of_an_orthonormal_weight():
    linear = OrthonormalLinear(7, 5, dtype=torch.float64)
    parameter = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear.parametrizations.weight[0], parameter)
    assert torch.autograd.gradgradcheck(linear.parametrizations.weight[0], parameter)


def test_fused_it_is_a_plain_linear_layer():
    linear = OrthonormalLinear(7, 5)
    fused, x = linear.fuse(), torch.randn(3, 7)
    assert list(fused.state_dict()) == ["weight", "bias"]
    assert_close(fused(x), linear(x), 1e-7)
