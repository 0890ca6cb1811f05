"""Pictures that are (nearly) the same, so that no two of them end up in different splits."""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Pairs = list[tuple[int, int]]


def close_pairs(first: np.ndarray, second: np.ndarray, rms: float, block: int = 1000) -> Pairs:
    """All (i, j), i ≠ j, with a root mean square difference of ``first[i]`` and ``second[j]`` below ``rms``.

    Args:
        first, second: (n, features). In float64 the distances of rows of integers are exact.
        rms: of one feature.
        block: rows compared at a time; the memory is O(block · n).
    """
    limit = rms**2 * first.shape[1]
    norms, others = (first * first).sum(1), (second * second).sum(1)
    pairs: Pairs = []
    for start in range(0, len(first), block):
        rows = slice(start, start + block)
        squared = norms[rows, None] + others[None] - 2 * first[rows] @ second.T
        i, j = np.nonzero(squared < limit)
        pairs += [(a, b) for a, b in zip((i + start).tolist(), j.tolist(), strict=True) if a != b]
    return pairs


def join(count: int, pairs: Pairs) -> np.ndarray:
    """Put 0 ... count − 1 into groups that pairs connect; (count,) group numbers, in order of first members."""
    i, j = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    _, groups = connected_components(coo_array((np.ones(len(i)), (i, j)), (count, count)), directed=False)
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]
