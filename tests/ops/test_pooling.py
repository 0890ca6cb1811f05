import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cbsa_torch import ops
from cbsa_torch.ops import pooling
from tests.helpers.compare import assert_close


@pytest.mark.parametrize(
    ("grid", "limit", "expected"),
    [
        ((14, 14), 64, (8, 8)),
        ((32, 32), 64, (8, 8)),
        ((10, 40), 64, (4, 16)),
        ((5,), 64, (5,)),
        ((1000,), 64, (64,)),
        ((4, 4), 64, (4, 4)),
        ((1, 100), 64, (1, 64)),
        ((8, 8, 8), 64, (4, 4, 4)),
        ((14, 14), 1, (1, 1)),
    ],
    ids=str,
)
def test_grid_closest_in_aspect(grid, limit, expected):
    assert ops.representative_grid(grid, limit) == expected


@pytest.mark.parametrize(
    ("grid", "cells", "expected"),
    [
        ((18, 24), (8, 8), (8, 8)),
        ((10, 40), [8, 8], (8, 8)),
        ((5, 40), (8, 8), (5, 8)),
        ((3, 3), (8, 8), (3, 3)),
        ((20,), (6,), (6,)),
        ((4, 9, 2), (2, 5, 3), (2, 5, 2)),
    ],
    ids=str,
)
def test_fixed_grid_is_pooled_as_pytorch_does_where_it_is_not_finer_than_the_tokens(grid, cells, expected):
    assert ops.representative_grid(grid, cells) == expected
    tokens = torch.randn(2, 3, math.prod(grid), 4).double()
    images = tokens.mT.reshape(6, 4, *grid)
    pooled = pooling._ADAPTIVE_POOL[len(grid)](images, expected).reshape(2, 3, 4, -1).mT
    assert_close(ops.pool_representatives(tokens, grid, cells).values, pooled, 1e-12)


@pytest.mark.parametrize("side", [8, 14, 37])
def test_fixed_grid_and_number_agree_on_squares(side):
    tokens = torch.randn(1, 2, side * side, 3)
    fixed, closest = (ops.pool_representatives(tokens, (side, side), m) for m in ((8, 8), 64))
    assert torch.equal(fixed.values, closest.values)
    assert fixed.token_weights == closest.token_weights


grids = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)


@given(grid=grids, limit=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_grid_is_never_finer_than_the_tokens_nor_above_the_limit(grid, limit):
    cells = ops.representative_grid(grid, limit)
    assert math.prod(cells) <= limit
    assert all(c <= g for c, g in zip(cells, grid, strict=True))


@pytest.mark.parametrize("grid", [(7,), (7, 11), (4, 5, 3)], ids=str)
def test_pools_averages_of_windows(grid):
    n = math.prod(grid)
    tokens = torch.randn(2, 3, n, 4).double()
    pooled, mask = ops.pool_representatives(tokens, grid, 12)[:2]
    assert mask is None
    cells = ops.representative_grid(grid, 12)
    weights = torch.ones(1, 1).double()
    for cell, side in zip(cells, grid, strict=True):
        window = torch.zeros(cell, side).double()
        for i in range(cell):
            window[i, i * side // cell : -(-(i + 1) * side // cell)] = 1
        weights = torch.kron(weights, window / window.sum(1, keepdim=True))
    assert_close(pooled, weights @ tokens, 1e-12)


@given(grid=grids, data=st.data())
@settings(max_examples=100, deadline=None)
def test_padded_items_pool_as_they_would_alone(grid, data):
    limit = data.draw(st.one_of(st.integers(1, 20), st.tuples(*[st.integers(1, 6)] * len(grid))))
    extents = [tuple(data.draw(st.integers(1, side)) for side in grid) for _ in range(2)]
    offsets = [
        tuple(data.draw(st.integers(0, side - e)) for side, e in zip(grid, extent, strict=True))
        for extent in extents
    ]
    tokens = torch.randn(2, 2, *grid, 3).double()
    real = torch.zeros(2, *grid, dtype=torch.bool)
    for b, (extent, offset) in enumerate(zip(extents, offsets, strict=True)):
        real[(b, *(slice(o, o + e) for o, e in zip(offset, extent, strict=True)))] = True
    flat = tokens.reshape(2, 2, -1, 3).masked_fill(~real.flatten(1)[:, None, :, None], float("nan"))
    pooled, mask = ops.pool_representatives(flat, grid, limit, token_mask=real.flatten(1))[:2]
    for b, (extent, offset) in enumerate(zip(extents, offsets, strict=True)):
        window = tuple(slice(o, o + e) for o, e in zip(offset, extent, strict=True))
        alone = tokens[(slice(b, b + 1), slice(None), *window)].reshape(1, 2, -1, 3)
        expected = ops.pool_representatives(alone, extent, limit).values
        count = expected.shape[2]
        assert mask[b].sum() == count
        assert mask[b, :count].all()
        assert_close(pooled[b : b + 1, :, :count], expected, 1e-12)
        assert (pooled[b, :, count:] == 0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_compiled_pooling_follows_the_number_and_the_grid_of_representatives(masked):
    torch._dynamo.reset()
    compiled = torch.compile(ops.pool_representatives, backend="eager", fullgraph=True)
    tokens, mask = torch.randn(2, 1, 36, 3), torch.rand(2, 36) > 0.3 if masked else None
    for number in (4, 5, 9, (2, 3), (3, 3), (4, 9)):
        pooled = compiled(tokens, (6, 6), number, token_mask=mask).values
        assert_close(pooled, ops.pool_representatives(tokens, (6, 6), number, token_mask=mask).values, 1e-6)


def test_masked_pooling_averages_in_float32():
    tokens = torch.ones(1, 1, 90_000, 1, dtype=torch.float16)
    mask = torch.ones(1, 90_000, dtype=torch.bool)
    pooled = ops.pool_representatives(tokens, (300, 300), 1, token_mask=mask).values
    assert pooled.item() == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = ops.pool_representatives(tokens.float(), (300, 300), 1, token_mask=mask).values
    assert pooled.dtype == torch.float32


def test_full_mask_equals_no_mask_and_empty_mask_gives_none():
    tokens = torch.randn(2, 2, 35, 3).double()
    mask = torch.tensor([[True], [False]]).expand(2, 35)
    pooled, exists = ops.pool_representatives(tokens, (5, 7), 9, token_mask=mask)[:2]
    expected = ops.pool_representatives(tokens, (5, 7), 9).values
    assert_close(pooled[:1, :, : expected.shape[2]], expected[:1], 1e-12)
    assert not exists[1].any()
    assert (pooled[1] == 0).all()


def test_cells_without_real_tokens_give_no_representative():
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, [0, 15]] = True  # two corners of a 4 x 4 grid
    tokens = torch.randn(1, 1, 16, 2)
    pooled, exists = ops.pool_representatives(tokens, (4, 4), 4, token_mask=mask)[:2]
    assert exists.tolist() == [[True, False, False, True]]
    assert torch.equal(pooled[0, 0, 0], tokens[0, 0, 0])
    assert torch.equal(pooled[0, 0, 3], tokens[0, 0, 15])


BAD_CELLS = [
    ((4,), ValueError, r"one entry for each axis of the grid, got \(4,\) for grid_size \(3, 3\)"),
    ((), ValueError, r"a tuple of one to three for a fixed grid, got \(\)"),
    ([2, 2, 2, 2], ValueError, r"a tuple of one to three for a fixed grid, got \[2, 2, 2, 2\]"),
    ((4, 0), ValueError, r"num_representatives\[1\] must be at least 1, got 0"),
    ((-1, 4), ValueError, r"num_representatives\[0\] must be at least 1, got -1"),
    ((True, 4), TypeError, r"num_representatives\[0\] must be an int, got True of type bool"),
    ((4, 4.0), TypeError, r"num_representatives\[1\] must be an int, got 4.0 of type float"),
    (4.0, TypeError, "must be an int, or a tuple of one to three for a fixed grid, got 4.0 of type float"),
    (True, TypeError, "num_representatives must be an int, or a tuple .* got True of type bool"),
    ("8, 8", TypeError, "num_representatives must be an int, or a tuple .* got '8, 8' of type str"),
]


def test_bad_input_is_named():
    for grid in ((0, 3), (2, 2, 2, 2)):
        with pytest.raises(ValueError, match="grid_size must be a tuple of one to three positive integers"):
            ops.representative_grid(grid, 4)
    with pytest.raises(ValueError, match="num_representatives must be at least 1"):
        ops.representative_grid((3, 3), 0)
    for cells, kind, message in BAD_CELLS:
        with pytest.raises(kind, match=message):
            ops.representative_grid((3, 3), cells)
    tokens = torch.zeros(1, 1, 9, 2)
    with pytest.raises(ValueError, match=r"got \(4, 4, 4\) for grid_size \(3, 3\)"):
        ops.pool_representatives(tokens, (3, 3), (4, 4, 4))
    with pytest.raises(ValueError, match=r"tokens must have shape .*\(3, 3\)"):
        ops.pool_representatives(tokens[:, :, :8], (3, 3), 4)
    with pytest.raises(ValueError, match="token_mask must have shape"):
        ops.pool_representatives(tokens, (3, 3), 4, token_mask=torch.ones(1, 8, dtype=torch.bool))


@pytest.mark.parametrize(
    ("grid_size", "cells"),
    [((14, 14), (8, 8)), ((65, 130), (7, 9)), ((1000,), (64,)), ((9, 20, 31), (2, 4, 7)), ((5, 64), (5, 8))],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float16, 2e-3)], ids=str)
def test_products_of_large_cells(grid_size, cells, dtype, tolerance):
    tokens = (1e4 * torch.randn(2, *grid_size, 6)).clamp(-6e4, 6e4).to(dtype)  # sums leave the range of float16
    expected = pooling._ADAPTIVE_POOL[len(cells)](tokens.double().movedim(-1, 1), cells).movedim(1, -1)
    pooled = pooling._pool_by_products(tokens, cells)
    assert pooled.dtype == dtype
    assert_close(pooled.double(), expected, tolerance)


@pytest.mark.parametrize("number", [1, 5, 16, 64, (3, 2), (8, 8)])
def test_the_form_for_torchscript_pools_the_same(number):
    limit, cells = (0, number) if isinstance(number, tuple) else (number, (0, 0))
    for grid in ((4, 4), (1, 9), (14, 3), (2, 31), (17, 16)):
        tokens = torch.randn(2, 3, 2 + math.prod(grid), 4)
        expected = ops.pool_representatives(tokens[:, :, 2:], grid, number).values
        assert_close(pooling.scripted_pool(tokens, 2, grid, limit, cells), expected, 1e-6)


@pytest.mark.parametrize(
    ("grid", "cells"), [((14, 14), (8, 8)), ((5, 40), (5, 8)), ((9,), (4,)), ((6, 5, 7), (2, 3, 4))]
)
def test_pooling_for_open_sizes_is_the_same(grid, cells):
    """What an export writes, by matrices that are made of the sizes."""
    maps = torch.randn(2, *grid, 3)
    expected = ops.pool_representatives(maps.reshape(2, 1, -1, 3), grid, cells).values
    assert_close(pooling._pool_any_size(maps, cells).reshape(2, 1, -1, 3), expected, 1e-6)
