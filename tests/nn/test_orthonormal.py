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


def test_making_a_weight_orthonormal_keeps_an_orthonormal_one():
    linear = nn.Linear(7, 5, dtype=torch.float64)
    nn.init.orthogonal_(linear.weight)
    expected = linear.weight.detach().clone()
    keep_rows_orthonormal(linear)
    assert_close(linear.weight, expected, 1e-14)
    linear.weight = torch.eye(5, 7, dtype=torch.float64)  # nothing to reflect
    assert_close(linear.weight, torch.eye(5, 7, dtype=torch.float64), 0)
    linear.weight = torch.zeros(5, 7, dtype=torch.float64)
    assert_close(linear.weight @ linear.weight.mT, torch.eye(5, dtype=torch.float64), 1e-14)
    linear.parametrizations.weight[0].signs.copy_(
        torch.tensor([0, 0.2, -0.2, 1, -1])
    )  # averages of two and more
    assert_close(linear.weight @ linear.weight.mT, torch.eye(5, dtype=torch.float64), 1e-14)
    reflectors = linear.parametrizations.weight.original
    torch.autograd.gradcheck(linear.parametrizations.weight[0], reflectors.detach().requires_grad_())
