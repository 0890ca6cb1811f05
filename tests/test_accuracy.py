"""Slow: the accuracy that the README promises for the demo."""

import pytest
from benchmarks.digits_family import Options, measure


@pytest.mark.slow
def test_digits_reach_98_percent_on_average_over_three_seeds(tmp_path):
    record = measure(Options(members=("cbt",), runs=tmp_path / "runs"))
    assert record["rows"][0]["mean"] >= 0.98
