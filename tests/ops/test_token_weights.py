"""The weights of tokens in initial guesses: as matrices, spread, summed up; against pooling itself."""

import math

import pytest
import torch

from cbsa_torch import ops
from cbsa_torch.ops import token_weights
from tests.helpers.compare import assert_close

LIKE = torch.empty(0, dtype=torch.float64)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize(("grid", "m"), [((7,), 3), ((5, 7), 9), ((4, 4), 16), ((3, 4, 5), 12)], ids=str)
def test_pooling_is_multiplication_by_its_weights(grid, m, first):
    n = math.prod(grid)
    tokens = torch.randn(2, 3, n, 4).double()
    pooled = ops.pool_representatives(tokens, grid, m)
    after = 1
    rows = torch.randn(2, 3, first + n + after, 1).double()  # tokens before and after the grid
    weights = token_weights.over_all_tokens(
        pooled.token_weights, rows, pooled.values.shape[2], first, None, None
    )
    matrix = token_weights.columns(weights, slice(0, first + n + after), LIKE)
    assert_close(matrix[..., first : first + n] @ tokens, pooled.values, 1e-12)
    assert (matrix[..., :first] == 0).all()
    assert (matrix[..., first + n :] == 0).all()
    assert torch.equal(token_weights.columns(weights, slice(1, 4), LIKE), matrix[..., 1:4])
    assert_close(token_weights.gram(weights, LIKE), matrix @ matrix.mT, 1e-12)
    given = torch.randn_like(pooled.values)
    assert_close(token_weights.spread(weights, given, first + n + after), matrix.mT @ given, 1e-12)


def test_masked_pooling_is_multiplication_by_its_weights():
    tokens, mask = torch.randn(3, 2, 20, 4).double(), torch.rand(3, 20) > 0.4
    mask[0] = False
    pooled = ops.pool_representatives(tokens, (4, 5), 6, token_mask=mask)
    m = pooled.values.shape[2]
    weights = token_weights.over_all_tokens(pooled.token_weights, tokens, m, 0, mask, pooled.mask)
    assert weights.shape == (3, m, 20)
    assert (weights[~pooled.mask] == 0).all()
    assert (weights.mT[~mask] == 0).all()
    assert_close(weights[:, None] @ tokens, pooled.values, 1e-12)
    given = torch.randn_like(pooled.values)
    assert_close(token_weights.spread(weights, given, 20), weights[:, None].mT @ given, 1e-12)
    assert_close(token_weights.gram(weights, LIKE)[:, 0], weights @ weights.mT, 1e-12)


def test_a_mask_makes_a_matrix_of_a_pooling():
    """Which holds no weight of what does not exist."""
    tokens, mask = torch.randn(1, 1, 8, 2).double(), torch.tensor([[True] * 6 + [False] * 2])
    weights = token_weights.over_all_tokens(ops.GridPooling((8,), (2,)), tokens, 2, 0, mask, None)
    assert torch.equal(weights, torch.tensor([[[0.25] * 4 + [0] * 4, [0] * 4 + [0.25] * 2 + [0] * 2]]).double())
