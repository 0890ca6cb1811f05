import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cbsa_torch import ops
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


@given(grid=grids, limit=st.integers(1, 20), data=st.data())
@settings(max_examples=60, deadline=None)
def test_padded_items_pool_as_they_would_alone(grid, limit, data):
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


def test_bad_input_is_named():
    for grid in ((0, 3), (2, 2, 2, 2)):
        with pytest.raises(ValueError, match="grid_size must be a tuple of one to three positive integers"):
            ops.representative_grid(grid, 4)
    with pytest.raises(ValueError, match="num_representatives must be at least 1"):
        ops.representative_grid((3, 3), 0)
    tokens = torch.zeros(1, 1, 9, 2)
    with pytest.raises(ValueError, match=r"tokens must have shape .*\(3, 3\)"):
        ops.pool_representatives(tokens[:, :, :8], (3, 3), 4)
    with pytest.raises(ValueError, match="token_mask must have shape"):
        ops.pool_representatives(tokens, (3, 3), 4, token_mask=torch.ones(1, 8, dtype=torch.bool))
