"""Packed sequences: every mixer does with each what it does with it alone, and with a padded batch of all."""

import pytest
import torch
from torch import nn

from cbsa_torch import CBSA
from cbsa_torch.nn import MHSA, MSSA, Packing, WhiteBoxBlock
from tests.helpers.compare import assert_close
from tests.helpers.mixers import DIM, HEADS, MIXERS, assert_same

LENGTHS = [5, 0, 9, 5, 1, 17, 13, 9]
"""With a prefix token: 4, 8, 4, 0, 16, ... tokens with coordinates."""
CU = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
COTANGENT = torch.randn(int(CU[-1]), DIM, dtype=torch.float64)


def draw_coords(k, kind="scattered"):
    count = sum(max(n - 1, 0) for n in LENGTHS)
    if kind == "duplicates":
        return torch.randint(0, 2, (count, k))
    if kind == "one cell":
        return torch.full((count, k), -3)
    if kind == "collinear":
        return torch.arange(count)[:, None].expand(-1, k)
    if kind == "huge":
        return torch.randint(-(2**50), 2**50, (count, k))
    return torch.randn(count, k, dtype=torch.float64)


def packed(layer, x, coords=None, grids=None):
    return layer(x, coords=coords, cu_seqlens=CU, grid_sizes=grids)


def alone(layer, x, coords=None, grids=None):
    outs, first = [], 0
    for i, n in enumerate(LENGTHS):
        if not n:
            continue
        own = None if coords is None else coords[None, first : first + n - 1]
        outs.append(layer(x[None, CU[i] : CU[i + 1]], None if grids is None else grids[i], coords=own)[0])
        first += n - 1
    return torch.cat(outs)


def padded(layer, x, coords):
    most, first = max(LENGTHS), 0
    tokens = x.new_full((len(LENGTHS), most, DIM), float("nan"))
    places = coords.new_zeros(len(LENGTHS), most - 1, coords.shape[1])
    mask = torch.zeros(len(LENGTHS), most, dtype=torch.bool)
    rows = list(x.split(LENGTHS))
    tokens = torch.stack([torch.cat([row, tokens[i, len(row) :]]) for i, row in enumerate(rows)])
    for i, n in enumerate(LENGTHS):
        mask[i, :n] = True
        if n:
            places[i, : n - 1] = coords[first : first + n - 1]
            first += n - 1
    return layer(tokens, token_mask=mask, coords=places)[mask]


def measured(how, layer, x, *args):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = how(layer, x, *args)
    out.backward(COTANGENT.to(out.dtype))
    return out.detach(), x.grad, {name: p.grad for name, p in layer.named_parameters()}


def tokens(dtype=torch.float64):
    return torch.randn(int(CU[-1]), DIM, dtype=dtype)


NO_CELLS = "cbsa module"
COORDS = [name for name in MIXERS if name != NO_CELLS]


@pytest.mark.parametrize("name", COORDS)
def test_coordinates(name):
    layer = MIXERS[name](num_prefix_tokens=1).double()
    x, coords = tokens(), draw_coords(2)
    expected = measured(alone, layer, x, coords)
    assert_same(measured(packed, layer, x, coords), expected, 1e-10)
    assert_same(measured(padded, layer, x, coords), expected, 1e-10)


@pytest.mark.parametrize("kind", ["scattered", "duplicates", "one cell", "collinear", "huge"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_any_coordinates(kind, k):
    for name in ("cbsa exact", "cbsa tied orthogonal certified", "adapted shared"):
        layer = MIXERS[name](num_prefix_tokens=1).double()
        x, coords = tokens(), draw_coords(k, kind)
        expected = measured(alone, layer, x, coords)
        assert_same(measured(packed, layer, x, coords), expected, 1e-10)
        assert_same(measured(padded, layer, x, coords), expected, 1e-10)


GRIDS = [(2, 2), None, (2, 4), (4, 1), (1,), (4, 4), (3, 4), (2, 2, 2)]


@pytest.mark.parametrize("name", MIXERS)
def test_grids(name, monkeypatch):
    lengths = [5, 0, 9, 5, 2, 17, 13, 9]
    monkeypatch.setattr(f"{__name__}.LENGTHS", lengths)
    monkeypatch.setattr(f"{__name__}.CU", torch.tensor([0, *torch.tensor(lengths).cumsum(0)]))
    monkeypatch.setattr(f"{__name__}.COTANGENT", torch.randn(sum(lengths), DIM, dtype=torch.float64))
    layer = MIXERS[name](num_prefix_tokens=1).double()
    x = tokens()
    assert_same(measured(packed, layer, x, None, GRIDS), measured(alone, layer, x, None, GRIDS), 1e-10)


@pytest.mark.parametrize("mixer", [MSSA, MHSA])
def test_causal(mixer):
    layer, x = mixer(DIM, HEADS).double(), tokens()
    out = layer(x, cu_seqlens=CU, is_causal=True)
    expected = [layer(row[None], is_causal=True)[0] for row in x.split(LENGTHS) if len(row)]
    assert_close(out, torch.cat(expected), 1e-10)


def test_squares_and_the_grid_of_a_layer():
    layer, x = CBSA(DIM, HEADS, num_representatives=4).double(), tokens()[:13]
    assert_close(
        layer(x, cu_seqlens=torch.tensor([0, 4, 13])),
        torch.cat([layer(x[None, :4])[0], layer(x[None, 4:])[0]]),
        1e-10,
    )
    named = Packing(torch.tensor([0, 5, 11]), num_prefix_tokens=2)  # 5 = 1 + 2 x 2, too
    with pytest.raises(ValueError, match="5 tokens, which less 2 prefix tokens is not a square"):
        layer(x[:11], cu_seqlens=named)
    layer.set_input_size((3, 2))
    assert_close(
        layer(x[:12], cu_seqlens=torch.tensor([0, 6, 12])), layer(x[:12].view(2, 6, DIM)).flatten(0, 1), 1e-10
    )


def test_one_object_for_all_layers(monkeypatch):
    """It is checked once, and cells are found once for each group."""
    from cbsa_torch.ops import coordinates

    calls = []
    find = coordinates.find_cells
    monkeypatch.setattr(coordinates, "find_cells", lambda *a, **k: calls.append(a) or find(*a, **k))
    blocks = nn.ModuleList(
        WhiteBoxBlock(DIM, CBSA(DIM, HEADS, num_representatives=4)) for _ in range(3)
    ).double()
    coords = draw_coords(2)
    packing = Packing(CU, coords=coords[None], num_prefix_tokens=1)
    x = y = tokens()[None]
    for block in blocks:
        x = block(x, cu_seqlens=packing)
    assert len(calls) == len(packing.groups) == 5
    for block in blocks:
        y = torch.cat([block(r[None], coords=c[None])[0] for r, c in apart(y[0], coords)])[None]
    assert_close(x, y, 1e-10)


def apart(x, coords):
    rows = [row for row in x.split(LENGTHS) if len(row)]
    return zip(rows, coords.split([n - 1 for n in LENGTHS if n]), strict=True)


def test_nested_tensors():
    layer, coords = CBSA(DIM, HEADS, num_representatives=4, num_prefix_tokens=1).double(), draw_coords(2)
    rows = [row.clone().requires_grad_() for row in tokens().split(LENGTHS)]
    nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    places = torch.nested.as_nested_tensor(
        list(coords.split([max(n - 1, 0) for n in LENGTHS])), layout=torch.jagged
    )
    out = nested + layer(nested, coords=places)
    out.values().backward(COTANGENT)
    flat = nested.values().detach().requires_grad_()
    expected = flat + packed(layer, flat, coords)
    expected.backward(COTANGENT)
    assert_close(out.values().detach(), expected.detach(), 1e-12)
    assert_close(torch.cat([row.grad for row in rows]), flat.grad, 1e-12)


@pytest.mark.parametrize(
    "options", [{"recompute": True}, {"impl": "tiled"}, {"step": "certified", "impl": "tiled"}]
)
def test_options(options):
    layer = CBSA(DIM, HEADS, num_representatives=4, num_prefix_tokens=1, **options).double()
    x, coords = tokens(), draw_coords(2)
    assert_same(measured(packed, layer, x, coords), measured(alone, layer, x, coords), 1e-10)


def test_autocast():
    layer = CBSA(DIM, HEADS, num_representatives=4, num_prefix_tokens=1)
    x, coords = tokens(torch.float32), draw_coords(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(measured(packed, layer, x, coords), measured(alone, layer, x, coords), 3e-2)


def test_compiled():
    """It runs, and is right, at other lengths as well."""
    layer = CBSA(DIM, HEADS, num_representatives=4, num_prefix_tokens=1).double()
    x, coords = tokens(), draw_coords(2)
    compiled = torch.compile(layer, backend="aot_eager")
    assert_close(packed(compiled, x, coords), packed(layer, x, coords), 1e-12)
    short = torch.tensor([0, 5, 14])
    out = compiled(x[:14], coords=coords[:12], cu_seqlens=short)
    assert_close(out, layer(x[:14], coords=coords[:12], cu_seqlens=short), 1e-12)


def test_only_empty_sequences():
    layer, x = CBSA(DIM, HEADS), torch.empty(0, DIM, requires_grad=True)
    out = layer(x, coords=torch.empty(0, 2), cu_seqlens=torch.tensor([0, 0, 0]))
    assert out.shape == (0, DIM)
    out.sum().backward()


def jagged(*lengths, width=2):
    return torch.nested.as_nested_tensor([torch.rand(n, width) for n in lengths], layout=torch.jagged)


X, GOOD = torch.randn(14, DIM), torch.tensor([0, 5, 14])


@pytest.mark.parametrize(
    ("kwargs", "kind", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 9, 5, 14])}, ValueError, "cu_seqlens must not decrease, got 9, 5 for sequence 1"),
        ({"cu_seqlens": torch.tensor([1, 5, 14])}, ValueError, "cu_seqlens must start at 0, got 1"),
        ({"cu_seqlens": torch.tensor([0, 5, 13])}, ValueError, r"cu_seqlens must end at the number of tokens of x \(14\), got 13"),
        ({"cu_seqlens": torch.tensor([0.0, 14.0])}, TypeError, "cu_seqlens must have dtype torch.int32 or torch.int64"),
        ({"cu_seqlens": torch.tensor([[0, 14]])}, ValueError, r"cu_seqlens must have shape \(sequences \+ 1,\)"),
        ({"cu_seqlens": [0, 14]}, TypeError, "cu_seqlens must be a torch.Tensor, got list"),
        ({"grid_sizes": [(2, 2)]}, ValueError, "grid_sizes must have one grid for each of 2 sequences, got 1"),
        ({"grid_sizes": [(2, 2), (3, 3)]}, ValueError, "sequence 1 9 tokens, which do not fit 1 prefix tokens and grid_size"),
        ({"grid_sizes": [(2, 2), (2, 4)], "coords": torch.rand(12, 2)}, ValueError, "grid_sizes or coords, not both"),
        ({"coords": torch.rand(14, 2)}, ValueError, "less 1 prefix tokens of each of 2 sequences"),
        ({"coords": torch.rand(2, 6, 2)}, ValueError, r"coords must have shape \(tokens, k\) beside cu_seqlens"),
        ({"coords": torch.full((12, 2), float("nan"))}, ValueError, "coords must be finite"),
        ({"token_mask": torch.ones(1, 14, dtype=torch.bool)}, ValueError, "token_mask must be None for packed"),
        ({"attn_mask": torch.ones(14, 14, dtype=torch.bool)}, ValueError, "attn_mask must be None for packed"),
        ({"grid_size": (2, 2)}, ValueError, "pass grid_sizes, one for each sequence"),
        ({"is_causal": True}, ValueError, "is_causal must be False"),
        ({"x": X.view(2, 7, DIM)}, ValueError, r"x must have shape \(1, T, C\) or \(T, C\) with C=12"),
        ({"cu_seqlens": None, "grid_sizes": [(2, 2)], "x": X[None]}, ValueError, "pass cu_seqlens"),
        ({"cu_seqlens": Packing(GOOD), "coords": torch.rand(12, 2)}, ValueError, "beside a Packing"),
        ({"cu_seqlens": Packing(GOOD, num_prefix_tokens=2)}, ValueError, "must be the layer's 1, got 2"),
        ({"cu_seqlens": Packing(GOOD)}, ValueError, "not a square grid"),
        ({"grid_sizes": 4}, ValueError, "grid_sizes must have one grid for each of 2 sequences, got 4"),
        ({"coords": torch.rand(12, 2).index_fill(0, torch.tensor([7]), torch.inf)}, ValueError, "in sequence 1"),
        ({"coords": jagged(5, 7)}, ValueError, "coords must have 4 rows for the tokens of sequence 0, got 5"),
        ({"x": jagged(6, 8, width=DIM)}, ValueError, r"cu_seqlens must be the offsets of the nested x, \[0, 6, 14\]"),
        ({"x": X.view(2, 7, DIM), "cu_seqlens": None, "coords": jagged(6, 6)}, ValueError, "coords must be a dense tensor for a batch"),
    ],
)  # fmt: skip
def test_bad_inputs_are_named(kwargs, kind, message):
    layer = CBSA(DIM, HEADS, num_representatives=4, num_prefix_tokens=1)
    given = {"x": X, "cu_seqlens": GOOD, **kwargs}
    with pytest.raises(kind, match=message):
        layer(given.pop("x"), **given)


def test_records_are_of_batches():
    with pytest.raises(ValueError, match="not packed sequences: take these one by one"):
        CBSA(DIM, HEADS).stages(X, cu_seqlens=GOOD)
