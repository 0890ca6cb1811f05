import math
import random

import pytest
import torch

from cbsa_torch import ops
from cbsa_torch.ops import coordinates
from cbsa_torch.ops.coordinates import Coordinates, mean_of_cells, spread_from_cells
from tests.helpers.compare import assert_close


def grid_coords(grid):
    return torch.cartesian_prod(*(torch.arange(side) for side in grid)).reshape(1, -1, len(grid))


PLACES = {
    "scattered": torch.rand(1, 60, 2, generator=torch.Generator().manual_seed(0)),
    "line": torch.rand(1, 60, 1, generator=torch.Generator().manual_seed(1)) * 1e6,
    "cloud": torch.randn(1, 60, 3, generator=torch.Generator().manual_seed(2)),
    "duplicates": torch.arange(60)[:, None].expand(-1, 2)[None] // 20,
    "one cell": torch.full((1, 60, 2), -7),
    "collinear": torch.stack([torch.arange(60), 3 * torch.arange(60) - 50], -1)[None],
    "huge": torch.arange(60)[None, :, None] * 2**40 - 2**45,
    "far apart": torch.cat([torch.rand(1, 30, 2), torch.rand(1, 30, 2) + 1e5], 1),
}
each_place = pytest.mark.parametrize("coords", PLACES.values(), ids=PLACES)


@each_place
def test_means_of_the_tokens_in_each_cell(coords):
    tokens = torch.randn(1, 2, 60, 3, dtype=torch.float64)
    cells = ops.find_cells(coords, 16)
    pooled = ops.pool_by_coordinates(tokens, coords, 16)
    count = int(cells.mask.sum())
    assert cells.mask[0, :count].all()
    assert len(torch.unique(coords[0].double(), dim=0)) >= count
    for m in range(16):
        inside = cells.cell[0] == m
        assert inside.sum() == cells.counts[0, m]
        mean = tokens[0, :, inside].mean(1) if m < count else torch.zeros(2, 3, dtype=torch.float64)
        assert_close(pooled.values[0, :, m], mean, 1e-12)
    assert pooled.mask.equal(cells.mask)
    assert cells.order[0].equal(cells.cell[0].argsort(stable=True))


def test_cells_are_numbered_row_major():
    coords = torch.tensor([[[0, 0], [9, 0], [0, 9], [9, 9], [1, 8]]])
    assert ops.find_cells(coords, (2, 2)).cell.tolist() == [[0, 2, 1, 3, 1]]


@each_place
def test_permuted_shifted_and_scaled(coords):
    order = torch.randperm(60)
    cells = ops.find_cells(coords, 16)
    permuted = ops.find_cells(coords[:, order], 16)
    assert permuted.cell.equal(cells.cell[:, order])
    assert permuted.counts.equal(cells.counts)
    if not coords.is_floating_point():
        assert ops.find_cells(3 * coords - 123456, 16).cell.equal(cells.cell)
    assert ops.find_cells(coords.double() * 2**-9, 16).cell.equal(cells.cell)


def test_grids_give_what_grid_pooling_gives():
    """Where the sides are multiples of the cells: PyTorch's windows overlap elsewhere."""
    draw, seen = random.Random(0), 0
    grids = [(n,) for n in range(1, 40, 3)] + [(draw.randint(1, 32), draw.randint(1, 32)) for _ in range(150)]
    grids += [tuple(draw.randint(1, 8) for _ in range(3)) for _ in range(60)] + [(16, 2), (4, 2), (12, 6)]
    for grid in grids:
        for number in (4, 16, 64, draw.randint(2, 130)):
            cells = ops.representative_grid(grid, number)
            if any(side % count for side, count in zip(grid, cells, strict=True)):
                continue
            seen += 1
            tokens = torch.randn(1, 1, math.prod(grid), 2, dtype=torch.float64)
            coords = grid_coords(grid) * draw.choice([1, 3, 224, 0.1]) - 17
            pooled = ops.pool_by_coordinates(tokens, coords, number)
            assert_close(
                pooled.values[:, :, pooled.mask[0]],
                ops.pool_representatives(tokens, grid, number).values,
                1e-12,
            )
    assert seen > 200


def test_every_item_is_what_it_is_alone():
    """Masked tokens may have any coordinates and values."""
    sizes, most = [17, 0, 1, 30], 30
    coords = torch.full((4, most, 2), float("nan"))
    tokens = torch.full((4, 2, most, 3), float("nan"), dtype=torch.float64)
    mask = torch.zeros(4, most, dtype=torch.bool)
    for i, n in enumerate(sizes):
        where = torch.randperm(most)[:n].sort().values
        mask[i, where] = True
        coords[i, where], tokens[i, :, where] = torch.rand(n, 2), torch.randn(2, n, 3, dtype=torch.float64)
    tokens.requires_grad_()
    pooled = ops.pool_by_coordinates(tokens, coords, 8, token_mask=mask)
    pooled.values.sum().backward()
    assert tokens.grad.isfinite().all()
    for i, n in enumerate(sizes):
        assert (tokens.grad[i][:, ~mask[i]] == 0).all()
        if not n:
            assert not pooled.mask[i].any()
            continue
        alone = ops.pool_by_coordinates(tokens[i : i + 1, :, mask[i]], coords[i : i + 1, mask[i]], 8)
        count = int(alone.mask.sum())
        assert pooled.mask[i].sum() == count
        assert_close(pooled.values[i, :, :count], alone.values[0, :, :count], 1e-12)


def some_cells():
    mask = torch.rand(2, 9) > 0.2
    return ops.find_cells(torch.rand(2, 9, 2), 4, token_mask=mask)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of opcheck itself
def test_gradients_of_gradients():
    cells = some_cells()
    rows = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: mean_of_cells(r, cells), rows)
    assert torch.autograd.gradgradcheck(lambda r: mean_of_cells(r, cells) ** 3, rows)
    torch.library.opcheck(coordinates._mean_op, (rows, *cells))
    torch.library.opcheck(coordinates._spread_op, (torch.randn(2, 4, 3, requires_grad=True), *cells))
    torch.library.opcheck(coordinates._place_op, (torch.rand(2, 9, 2), torch.rand(2, 9) > 0.2))
    torch.library.opcheck(coordinates._find_op, (torch.rand(2, 9, 2), torch.rand(2, 9) > 0.2, [4], False))


def test_plain_operations_are_the_same(monkeypatch):
    cells = some_cells()
    rows, back = torch.randn(2, 9, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    fast = mean_of_cells(rows, cells), spread_from_cells(back, cells)
    gradient = torch.func.grad(lambda r: (mean_of_cells(r, cells) * back).sum())(rows)
    monkeypatch.setattr(coordinates, "is_transformed", lambda: True)
    assert_close(mean_of_cells(rows, cells), fast[0], 1e-12)
    assert_close(spread_from_cells(back, cells), fast[1], 1e-12)
    assert_close(gradient, fast[1], 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_summed_in_float32(dtype):
    tokens = torch.full((1, 1, 4096, 8), 1.001).to(dtype)
    pooled = ops.pool_by_coordinates(tokens, torch.zeros(1, 4096, 2), 4).values
    assert pooled.dtype == dtype
    assert_close(pooled[:, :, 0], tokens[:, :, 0], 1e-5)


def test_no_tokens_give_a_representative_that_does_not_exist():
    pooled = ops.pool_by_coordinates(torch.randn(2, 1, 0, 3), torch.empty(2, 0, 2), 4)
    assert pooled.values.shape == (2, 1, 1, 3)
    assert not pooled.mask.any()
    assert not pooled.values.any()


def test_coordinates_are_searched_once(monkeypatch):
    calls = []
    monkeypatch.setattr(coordinates, "find_cells", lambda *args, **kwargs: calls.append(args) or object())
    coords, mask = Coordinates(torch.rand(1, 5, 2)), torch.ones(1, 6, dtype=torch.bool)
    first = coords.cells(4)
    assert coords.cells(4) is first
    assert coords.cells(8) is not first
    assert coords.cells(4, mask) is not first
    assert coords.cells(4, mask) is coords.cells(4, mask)
    assert len(calls) == 3


def test_certified_steps_know_which_tokens_are_averaged():
    tokens, coords, mask = torch.randn(2, 1, 9, 4), torch.rand(2, 9, 2), torch.rand(2, 9) > 0.3
    right = ops.pool_by_coordinates(tokens, coords, 4, token_mask=mask)
    assert ops.certified_cbsa(tokens, right, fraction=0.5, token_mask=mask).isfinite().all()
    wrong = ops.pool_by_coordinates(tokens, coords, 4)
    with pytest.raises(ValueError, match="token_mask must be the one that the cells"):
        ops.certified_cbsa(tokens, wrong, fraction=0.5, token_mask=torch.zeros_like(mask))


TOKENS, PLACE = torch.randn(1, 2, 5, 3), torch.rand(1, 5, 2)


@pytest.mark.parametrize(
    ("kwargs", "kind", "message"),
    [
        ({"coords": torch.rand(1, 4, 2)}, ValueError, "coords must be of the 5 tokens of 1 items"),
        ({"coords": torch.rand(5, 2)}, ValueError, r"coords must have shape \(B, N, k\), k = 1, 2 or 3"),
        ({"coords": torch.rand(1, 5, 4)}, ValueError, "k = 1, 2 or 3"),
        (
            {"coords": PLACE > 0.5},
            TypeError,
            "coords must have an integer or floating-point dtype, got torch.bool",
        ),
        ({"coords": PLACE.to(torch.complex64)}, TypeError, "got torch.complex64"),
        ({"coords": [1, 2]}, TypeError, "coords must be a torch.Tensor, got list"),
        ({"coords": PLACE * float("nan")}, ValueError, "coords must be finite"),
        ({"num_representatives": None}, ValueError, "num_representatives is required"),
        ({"num_representatives": (2, 2, 2)}, ValueError, "one entry for each coordinate"),
        ({"num_representatives": (2**32, 2**32)}, ValueError, "at most 2.50 cells"),
        ({"num_representatives": 0}, ValueError, "num_representatives must be at least 1"),
        ({"token_mask": torch.ones(1, 4, dtype=torch.bool)}, ValueError, "token_mask must have shape"),
        ({"coords": ops.find_cells(PLACE, 4)}, ValueError, "cannot be given beside cells"),
        ({"coords": PLACE.to("meta")}, ValueError, "device"),
        ({"tokens": TOKENS[0]}, ValueError, r"tokens must have shape \(B, H, N, P\)"),
    ],
)
def test_bad_inputs_are_named(kwargs, kind, message):
    given = {"tokens": TOKENS, "coords": PLACE, "num_representatives": 4, **kwargs}
    with pytest.raises(kind, match=message):
        ops.pool_by_coordinates(given.pop("tokens"), given.pop("coords"), **given)
