"""Slow: the accuracy that the README promises for the demo."""

import pytest
from benchmarks.digits_accuracy import Options, measure


@pytest.mark.slow
def test_digits_reach_98_percent_on_average_over_three_seeds(tmp_path):
    record = measure(Options(runs=tmp_path / "runs", output=tmp_path / "result.json"))
    assert record["mean"] >= 0.98
