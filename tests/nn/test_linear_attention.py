"""Linear attention against its explicit matrix and against softmax attention."""

import pytest
import torch
from torch.nn import functional as F

from cbsa_torch import ops
from cbsa_torch.nn import LinearAttention
from tests.helpers.compare import assert_close
from tests.helpers.mixers import DIM, HEADS

X = torch.randn(2, 17, DIM, generator=torch.Generator().manual_seed(3)).double()


def test_linear_attention_is_its_explicit_matrix():
    layer = LinearAttention(DIM, HEADS).double()
    torch.nn.init.uniform_(layer.temperature, 0.5, 1.5)
    heads = layer.heads(X)
    gain = layer.temperature[:, None, None] * layer.head_dim**0.25
    q, k = (torch.cat([t * gain, -t * gain], -1).exp() for t in (heads.queries, heads.keys))
    weights = q @ k.mT
    assert_close(layer.mix(heads), weights @ heads.values / weights.sum(-1, keepdim=True), 1e-12)


def test_linear_attention_has_the_slope_of_softmax_attention():
    q, k, v = (torch.randn(1, 2, 50, 16).double() for _ in range(3))
    k = F.normalize(k, dim=-1)  # the term in |k|^2 is then the same for all
    mean = v.mean(2, keepdim=True)
    for size in (1e-2, 1e-3):
        linear = ops.linear_attention(size * q, size * k, v) - mean
        softmax = ops.softmax_attention(size * q, size * k, v) - mean
        assert_close(linear, softmax, 20 * size)


def test_linear_attention_of_huge_numbers_stays_finite():
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    q, k, v = (t.requires_grad_() for t in (1e4 * q, 1e4 * k, v))
    out = ops.linear_attention(q, k, v)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(v.grad).all()
    mask = torch.zeros(1, 9, dtype=torch.bool)
    assert (ops.linear_attention(q, k, v, key_mask=mask) == 0).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": torch.zeros(1, 2, 3)}, ValueError, "queries must have shape"),
        ({"keys": torch.zeros(1, 2, 5, 3)}, ValueError, "keys must have shape"),
        ({"values": torch.zeros(1, 2, 4, 4)}, ValueError, "values must have shape"),
        ({"values": torch.zeros(1, 2, 5, 4).double()}, TypeError, "values must have the dtype"),
        ({"temperature": torch.ones(3)}, ValueError, "temperature must have shape"),
        ({"key_mask": torch.ones(1, 4, dtype=torch.bool)}, ValueError, "key_mask must have shape"),
    ],
)
def test_bad_operands_of_linear_attention_are_named(change, error, message):
    good = {name: torch.zeros(1, 2, 5, 4) for name in ("queries", "keys", "values")}
    with pytest.raises(error, match=message):
        ops.linear_attention(**{**good, **change})
