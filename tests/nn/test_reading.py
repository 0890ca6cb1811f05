"""Coordinates and masks as mixers read them."""

import pytest
import torch
from torch import nn

from cbsa_torch import CBSA, ops
from cbsa_torch.nn import MSSA, AgentAttention, Coordinates, LinearCBSA
from tests.helpers.compare import assert_close
from tests.helpers.mixers import DIM, HEADS, MIXERS, ShiftedPool

X, COORDS = torch.randn(2, 21, DIM, dtype=torch.float64), torch.rand(2, 20, 2, dtype=torch.float64)


@pytest.mark.parametrize("name", [name for name in MIXERS if name not in ("cbsa module", "cbsa function")])
def test_permuted_tokens_are_permuted(name):
    layer = MIXERS[name](num_prefix_tokens=1).double()
    order = torch.randperm(20)
    rows = torch.cat([torch.zeros(1, dtype=torch.int64), order + 1])
    assert_close(layer(X[:, rows], coords=COORDS[:, order]), layer(X, coords=COORDS)[:, rows], 1e-10)


@pytest.mark.parametrize("step", ["free", "certified"])
def test_coordinates_of_a_grid_are_the_grid(step):
    layer = CBSA(DIM, HEADS, num_representatives=4, step=step).double()
    x = torch.randn(2, 24, DIM, dtype=torch.float64)
    coords = torch.cartesian_prod(torch.arange(4), torch.arange(6)).expand(2, -1, -1)
    assert ops.representative_grid((4, 6), 4) == (2, 2)
    assert_close(layer(x, coords=coords), layer(x, (4, 6)), 1e-10)


@pytest.mark.parametrize("options", [{"impl": "tiled"}, {"impl": "tiled", "proj_bias": True}])
def test_certified_tiles_are_the_equations(options, monkeypatch):
    """Several tiles, a folded projection, masks, and tokens before those with cells."""
    from cbsa_torch.ops.cbsa import api, tiles

    monkeypatch.setattr(tiles, "TILE", 7)
    mask = torch.rand(2, 21) > 0.3
    layer = CBSA(DIM, HEADS, num_representatives=4, step="certified", impl="eager").double()
    for token_mask in (None, mask):
        results = []
        for impl, folded in (("eager", False), ("tiled", False), ("tiled", True)):
            layer.impl = impl
            monkeypatch.setattr(api, "folds", lambda *_, folded=folded: folded)
            x = X.clone().requires_grad_()
            out = layer(x, token_mask=token_mask, coords=COORDS)
            (gradient,) = torch.autograd.grad((out**2).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad((gradient**2).sum(), x)
            results.append((out.detach(), gradient.detach(), second))
        for other in results[1:]:
            for got, expected in zip(other, results[0], strict=True):
                assert_close(got, expected, 1e-9)


def test_nothing_of_size_m_times_n_is_saved():
    layer = CBSA(64, 4, num_representatives=64, step="certified", impl="tiled")
    x, sizes = torch.randn(1, 4096, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        layer(x, coords=torch.rand(1, 4096, 2))
    assert max(sizes) <= 4096 * 64


def test_one_search_for_all_layers(monkeypatch):
    from cbsa_torch.ops import coordinates

    calls, find = [], coordinates.find_cells
    monkeypatch.setattr(coordinates, "find_cells", lambda *a, **k: calls.append(a) or find(*a, **k))
    layers = nn.ModuleList(CBSA(DIM, HEADS, num_representatives=4) for _ in range(3)).double()
    shared, mask = Coordinates(COORDS), torch.rand(2, 21) > 0.3
    for layer in layers:
        assert_close(layer(X, token_mask=mask, coords=shared), layer(X, token_mask=mask, coords=COORDS), 1e-12)
    assert len(calls) == 1 + len(layers)


@pytest.mark.parametrize("masked", [False, True])
def test_compiled_in_one_graph(masked):
    """Two layers that share their cells; other coordinates need no other graph."""
    layer = CBSA(DIM, HEADS, num_representatives=4).double()
    mask = torch.rand(2, 21) > 0.3 if masked else None

    def run(x, coords):
        places = Coordinates(coords)
        return layer(layer(x, token_mask=mask, coords=places), token_mask=mask, coords=places)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for coords in (COORDS, torch.arange(40).view(2, 20, 1).expand(-1, -1, 2).double()):
        results = []
        for function in (run, compiled):
            x = X.clone().requires_grad_()
            out = function(x, coords)
            results.append((out.detach(), *torch.autograd.grad((out**2).sum(), x)))
        for got, expected in zip(*results, strict=True):
            assert_close(got, expected, 1e-12)
    with pytest.raises(ValueError, match="coords must be finite"):
        compiled(X.clone().requires_grad_(), COORDS * float("nan"))


def test_a_strategy_of_ones_own():
    class Shifted(ShiftedPool):
        takes_cells, num_representatives = True, 4

        def forward(self, tokens, place, token_mask):
            pooled = ops.pool_by_coordinates(tokens, place)
            return pooled._replace(values=pooled.values + self.shift.to(tokens.dtype))

    layer = CBSA(DIM, HEADS, representatives=Shifted()).double()
    assert layer(X, coords=COORDS).shape == X.shape
    with pytest.raises(ValueError, match="coords must be None: representatives .ShiftedPool. need a grid"):
        CBSA(DIM, HEADS, representatives=ShiftedPool()).double()(X, coords=COORDS)


@pytest.mark.parametrize(
    ("kwargs", "kind", "message"),
    [
        ({"grid_size": (4, 5)}, ValueError, "pass coords or a grid"),
        ({"coords": COORDS[:1]}, ValueError, "coords must have shape .B, N, k. with B=2"),
        ({"coords": torch.rand(2, 22, 2)}, ValueError, "coordinates for at most N tokens, where x has N=21"),
        ({"coords": COORDS.to("meta")}, ValueError, "coords must be on the device of x"),
        ({"coords": COORDS > 0.5}, TypeError, "coords must have an integer or floating-point dtype"),
        ({"coords": COORDS * float("nan")}, ValueError, "coords must be finite"),
        ({"x": torch.zeros(2, DIM, 4, 5, dtype=torch.float64)}, ValueError, "pass coords or a grid"),
    ],
)
def test_bad_coordinates_are_named(kwargs, kind, message):
    given = {"x": X, "coords": COORDS, **kwargs}
    with pytest.raises(kind, match=message):
        CBSA(DIM, HEADS).double()(given.pop("x"), **given)


def test_coordinates_that_do_not_fit_the_layer():
    with pytest.raises(ValueError, match="N less 2 prefix tokens"):
        AgentAttention(DIM, HEADS, num_prefix_tokens=2).double()(X, coords=COORDS)
    with pytest.raises(ValueError, match="coords need layout='standard'"):
        CBSA(DIM, HEADS, layout="official").double()(X, coords=COORDS)
    with pytest.raises(ValueError, match="coordinates for at most N tokens"):
        LinearCBSA(DIM, HEADS).double()(X, coords=torch.rand(2, 22, 2))


HIDDEN = {"infinite": -torch.inf, "lowest": torch.finfo(torch.float32).min, "some": -1e4}


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("name", ["cbsa", "mssa", "mhsa", "linear", "tssa"])
def test_additive_masks_of_keys_are_token_masks(name, hidden):
    layer = MIXERS[name](num_prefix_tokens=1, grid_size=(4, 5)).double()
    mask = torch.rand(2, 21) > 0.3
    additive = torch.zeros(2, 21, dtype=torch.float64).masked_fill(~mask, hidden)
    expected = layer(X, token_mask=mask)
    assert_close(layer(X, attn_mask=additive[:, None]), expected, 0)
    assert_close(layer(X, attn_mask=additive[:, None, None]), expected, 0)


def test_masks_that_weigh_keys():
    weights = torch.rand(2, 1, 1, 21, dtype=torch.float64)
    with pytest.raises(ValueError, match="attn_mask must keep keys .0. or hide them"):
        LinearCBSA(DIM, HEADS).double()(X, attn_mask=weights)
    layer = MSSA(DIM, HEADS).double()  # which has weights
    assert_close(layer(X, attn_mask=weights), layer(X, attn_mask=weights.expand(2, 1, 21, 21)), 1e-12)
