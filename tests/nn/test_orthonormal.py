"""Orthonormal bases stay so, whatever happens to their parameter."""

import copy

import pytest
import torch
from torch import nn

from cbsa_torch import ops
from cbsa_torch.nn import MSSA
from cbsa_torch.nn.orthonormal import keep_rows_orthonormal
from tests.helpers.compare import assert_close
from tests.helpers.mixers import DIM, HEAD_DIM, HEADS, MIXERS, ORTHOGONAL, assert_orthonormal, merge, split


@pytest.mark.parametrize("name", ORTHOGONAL)
@pytest.mark.parametrize("head_dim", [HEAD_DIM, 3])
def test_orthonormal_bases_stay_so_in_training(name, head_dim):
    layer = MIXERS[name](head_dim=head_dim)
    assert_orthonormal(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
    before = layer.qkv.weight.detach().clone()
    x = torch.randn(4, 9, DIM)
    for _ in range(5):
        optimizer.zero_grad()
        (layer(x) - x).square().mean().backward()
        optimizer.step()
    assert (layer.qkv.weight - before).abs().max() > 1e-3
    assert_orthonormal(layer)


def test_orthonormal_bases_span_disjoint_subspaces():
    """U_i^T U_j = 0: with tied projections, what one head moves no other head sees."""
    layer = MSSA(DIM, HEADS, tied=True, orthogonal=True).double()
    x = torch.randn(2, 9, DIM).double()
    assert_close(layer(x) @ layer.qkv.weight.T, merge(ops.mssa(split(x @ layer.qkv.weight.T))), 1e-10)


def test_orthogonal_bases_in_half_precision_are_refused_at_any_time():
    layer = MSSA(12, 3, orthogonal=True).bfloat16()
    with pytest.raises(ValueError, match="orthogonal needs float32 or float64 parameters, got torch.bfloat16"):
        layer(torch.randn(1, 4, 12, dtype=torch.bfloat16))


@pytest.mark.parametrize("decay", [1e-4, 0.1])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_orthogonal_bases_survive_weight_decay_and_averaging(optimizer, decay):
    layer = MSSA(DIM, HEADS, orthogonal=True, tied=True)
    steps = optimizer(layer.parameters(), lr=0.1, weight_decay=decay)
    average = copy.deepcopy(layer)
    for _ in range(5):
        layer(torch.randn(2, 9, DIM)).square().mean().backward()
        steps.step()
        for mean, new in zip(average.parameters(), layer.parameters(), strict=True):
            mean.data.lerp_(new.data, 0.1)
    for model in (layer, average):
        bases = model.qkv.weight
        assert_close(bases @ bases.mT, torch.eye(DIM), 1e-5)


def test_making_a_weight_orthonormal_keeps_an_orthonormal_one():
    linear = nn.Linear(7, 5, dtype=torch.float64)
    nn.init.orthogonal_(linear.weight)
    expected = linear.weight.detach().clone()
    keep_rows_orthonormal(linear)
    assert_close(linear.weight, expected, 1e-14)
    linear.weight = torch.eye(5, 7, dtype=torch.float64)  # nothing to reflect
    assert_close(linear.weight, torch.eye(5, 7, dtype=torch.float64), 0)
    reflectors = linear.parametrizations.weight.original
    torch.autograd.gradcheck(linear.parametrizations.weight[0], reflectors.detach().requires_grad_())
