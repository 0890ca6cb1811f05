"""Rank correlation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, tied values sharing the mean of theirs.

    NaN where it is undefined: fewer than two pairs, a NaN among the values, or all values of one side equal.

    Raises:
        ValueError: sequences of different lengths.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"x and y must be two lists of one length, got shapes {a.shape} and {b.shape}")
    if len(a) < 2 or np.isnan(a).any() or np.isnan(b).any():
        return float("nan")
    a, b = _centred_ranks(a), _centred_ranks(b)
    norm = np.sqrt((a @ a) * (b @ b))
    return float("nan") if norm == 0 else float(np.clip(a @ b / norm, -1.0, 1.0))


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    _, position, count = np.unique(values, return_inverse=True, return_counts=True)
    rank: np.ndarray = (np.cumsum(count) - (count - 1) / 2)[position]
    return rank - rank.mean()
