"""Strategies of representatives: what they are given, what they return, what is refused."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from cbsa_torch import CBSA, ops
from cbsa_torch.nn import AdaptedCBSA, AgentAttention
from cbsa_torch.ops import GridPooling, Representatives
from tests.helpers.compare import assert_close
from tests.helpers.mixers import DIM, HEADS, merge, split


def returns(what, **attributes):
    def strategy(tokens, grid_size, token_mask):
        return what(tokens)

    for name, value in attributes.items():
        setattr(strategy, name, value)
    return strategy


def with_attention(tokens):
    weights = torch.full((*tokens.shape[:2], 2, tokens.shape[2]), 0.1)
    return Representatives(tokens[:, :, :2], attention=weights)


def without_attention(tokens):
    return Representatives(tokens[:, :, :2])


def with_no_attention(tokens):
    return Representatives(tokens, attention=torch.ones(1))


BAD_STRATEGIES = [
    (returns(lambda tokens: tokens[:, :, :2]), TypeError, r"must return ops.Representatives\(.*got Tensor"),
    (returns(lambda tokens: None), TypeError, "must return ops.Representatives.*got NoneType"),
    (returns(lambda tokens: (tokens, None)), TypeError, "must return ops.Representatives.*got tuple"),
    (returns(with_attention), ValueError, "gives_attention = True if and only if.*got one"),
    (returns(without_attention, gives_attention=True), ValueError, "gives_attention = True if.*got none"),
    (returns(lambda tokens: Representatives(tokens[..., :2])), ValueError, "representatives must have shape"),
    (
        returns(lambda tokens: Representatives(tokens, torch.ones(2, 3))),
        TypeError,
        "must have dtype torch.bool",
    ),
    (returns(with_no_attention, gives_attention=True), ValueError, "attention must have shape"),
]


@pytest.mark.parametrize(("strategy", "kind", "message"), BAD_STRATEGIES)
def test_strategies_that_break_the_protocol_are_named(strategy, kind, message):
    layer = CBSA(DIM, HEADS, representatives=strategy)
    with pytest.raises(kind, match=message):
        layer(torch.zeros(2, 9, DIM))


def test_a_strategy_of_your_own_may_bring_its_attention():
    layer = CBSA(DIM, HEADS, representatives=returns(with_attention, gives_attention=True))
    assert layer.step_representatives is None
    x = torch.randn(2, 9, DIM)
    tokens = split(x @ layer.qkv.weight.T)
    values, _, attention = with_attention(tokens)[:3]
    out = ops.contract_and_broadcast(tokens, values, attention, step_tokens=layer.step_tokens)
    assert_close(layer(x), layer.proj(merge(out)), 1e-5)


@pytest.mark.parametrize("mixer", [CBSA, AgentAttention])
def test_what_a_strategy_is_given(mixer):
    """Grid tokens and their grid if it needs them, otherwise all tokens and None."""
    seen = []

    def strategy(tokens, grid_size, token_mask):
        seen.append((tokens, grid_size, token_mask))
        return Representatives(tokens[:, :, :2])

    x, feature_map = torch.randn(2, 1 + 12, DIM), torch.randn(2, DIM, 2, 5)
    mask = torch.arange(13) < torch.tensor([[13], [6]])
    layer = mixer(DIM, HEADS, representatives=strategy, qkv="shared")
    layer(x, (3, 4), mask)
    strategy.needs_grid = True
    layer(x, (3, 4), mask)
    layer(feature_map)
    every = split(x.masked_fill(~mask[..., None], 0.0) @ layer.qkv.weight.T)
    mapped = split(feature_map.flatten(2).mT @ layer.qkv.weight.T)
    expected = [(every, None, mask), (every[:, :, 1:], (3, 4), mask[:, 1:]), (mapped, (2, 5), None)]
    for got, wanted in zip(seen, expected, strict=True):
        assert_close(got[0], wanted[0], 1e-6)
        assert got[1] == wanted[1]
        assert got[2] is wanted[2] is None or torch.equal(got[2], wanted[2])


@pytest.mark.parametrize("kind", ["principal", "basis", "pool", "learned", "tokens"])
def test_counts_include_what_representatives_cost(kind):
    number = {"num_representatives": 4} if kind in ("pool", "learned") else {}
    layer = CBSA(12, 3, representatives=kind, contraction="exact", **number)
    x = torch.randn(1, 16, 12)
    projections = 2 * 2 * 16 * 12 * 12
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        layer.requires_grad_(False)(x)
    assert layer.counts(x).products + projections == counter.get_total_flops()


def test_nan_in_one_item_leaves_the_others_alone_along_principal_directions():
    layer = CBSA(12, 3, representatives="principal", contraction="exact")
    x = torch.randn(2, 16, 12)
    expected = layer(x)[1]
    x[0, 3, 4] = torch.nan
    out = layer(x)
    assert out[0].isnan().any()
    assert_close(out[1], expected, 1e-6)


def test_agents_with_an_attention_are_refused():
    def silent(tokens, grid_size, token_mask):
        return ops.Representatives(tokens, None, torch.zeros(*tokens.shape[:3], tokens.shape[2]))

    with pytest.raises(ValueError, match="must not return an attention"):
        AgentAttention(12, 3, representatives=silent)(torch.randn(1, 4, 12))


def test_a_strategy_is_reset_down_to_its_parts():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4))

        def forward(self, tokens, grid_size, token_mask):
            return ops.Representatives(self.inner(tokens[:, :, :2]))

    layer = CBSA(12, 3, representatives=Nested())
    before = layer.representatives.inner[0].weight.clone()
    layer.reset_parameters()
    assert not torch.equal(before, layer.representatives.inner[0].weight)


def test_principal_directions_and_the_softmax_contraction_do_not_go_together():
    with pytest.raises(ValueError, match="the signs of principal directions are arbitrary"):
        CBSA(DIM, HEADS, representatives="principal")


@pytest.mark.parametrize("contraction", ["exact", "none"])
def test_more_dimensions_than_tokens_along_principal_directions(contraction):
    layer = CBSA(DIM, HEADS, representatives="principal", contraction=contraction).double()
    x = torch.randn(2, 3, DIM).double()  # 3 tokens, 4 dimensions
    padded = torch.cat([x, torch.full((2, 2, DIM), torch.nan).double()], dim=1)
    mask = torch.arange(5).expand(2, 5) < 3
    assert_close(layer(padded, token_mask=mask)[:, :3], layer(x), 1e-12)
    chosen = layer.representatives(split(x @ layer.qkv.weight.T), None, None)
    empty = chosen.values.square().sum(-1) == 0
    assert empty.sum(-1).eq(1).all()
    assert (chosen.attention[empty] == 0).all()


@pytest.mark.parametrize(
    "build",
    [
        CBSA,
        AgentAttention,
        AdaptedCBSA,
        functools.partial(CBSA, step="certified"),
        functools.partial(CBSA, step="certified", impl="eager"),
    ],
    ids=str,
)
def test_a_fixed_grid_of_representatives_in_every_layer(build):
    """4 x 4 cells of 4 x 16 tokens, where the number 16 gives 2 x 8; a padded item as if alone, with 3 x 4."""
    layer = build(DIM, HEADS, num_representatives=[4, 4], num_prefix_tokens=1).double()
    assert layer.representatives.num_representatives == (4, 4)
    assert "num_representatives=(4, 4)" in repr(layer)

    def pool(tokens, grid_size, token_mask):
        pooled = F.adaptive_avg_pool2d(tokens.mT.flatten(0, 1).unflatten(-1, grid_size), (4, 4))
        values = pooled.flatten(2).unflatten(0, tokens.shape[:2]).mT
        return Representatives(values, token_weights=GridPooling(grid_size, (4, 4)))

    pool.needs_grid = True
    plain = copy.deepcopy(layer)
    del plain.representatives
    plain.representatives = pool
    x = torch.randn(2, 65, DIM).double()
    expected = plain(x, grid_size=(4, 16))
    assert_close(layer(x, grid_size=(4, 16)), expected, 1e-12)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert_close(compiled(x, grid_size=(4, 16)), expected, 1e-12)

    mask = torch.zeros(2, 4, 16, dtype=torch.bool)
    mask[0], mask[1, 1:, 2:9] = True, True
    cells = F.pad(mask.flatten(1), (1, 0), value=True)
    padded = layer(x, grid_size=(4, 16), token_mask=cells)
    assert_close(padded[0], expected[0], 1e-12)
    assert_close(padded[1, cells[1]], layer(x[1:, cells[1]], grid_size=(3, 7))[0], 1e-12)
    with pytest.raises(ValueError, match=r"each axis of the grid, got \(4, 4\) for grid_size \(64,\)"):
        layer(x, grid_size=(64,))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"eps": 0.5}, ValueError, "eps is of contraction='exact'"),
        ({"representatives": "tokens", "num_representatives": 4}, ValueError, "num_representatives is of"),
        (
            {"representatives": "learned", "num_representatives": (2, 2)},
            TypeError,
            r"must be an int for representatives='learned', which have no grid, got \(2, 2\)",
        ),
        ({"num_representatives": [4, 0]}, ValueError, r"num_representatives\[1\] must be at least 1, got 0"),
        ({"representatives": nn.Identity}, TypeError, "must be an instance, got the class Identity"),
        ({"representatives": None}, ValueError, "or pass a function or module of your own"),
        ({"tied": "no"}, TypeError, "tied must be True or False, got 'no'"),
        ({"orthogonal": 1}, TypeError, "orthogonal must be True or False"),
    ],
)
def test_options_without_effect_are_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        CBSA(DIM, HEADS, **options)


def test_a_strategy_is_on_a_grid_or_gives_its_attention():
    def both(tokens, grid_size, token_mask):
        raise AssertionError

    both.needs_grid = both.gives_attention = True
    with pytest.raises(ValueError, match="cannot have both needs_grid and gives_attention"):
        CBSA(DIM, HEADS, representatives=both)
