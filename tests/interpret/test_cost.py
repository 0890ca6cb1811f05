"""benchmarks/interpret_cost.py: that it measures, and that capture keeps its limit."""

import sys

import pytest

from benchmarks import interpret_cost

linux = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")


@linux
def test_costs_of_a_small_model(monkeypatch):
    monkeypatch.setattr(interpret_cost, "in_a_process", interpret_cost.growth)
    options = interpret_cost.Options("cbt_pico_patch1_8", 8, channels=1, batch_size=2, repetitions=3)
    found = interpret_cost.measure(options)
    assert set(found["gib"]) == set(interpret_cost.PASSES)
    assert all(0 <= gib < 1 for gib in found["gib"].values())
    assert len(found["ratios"]) == 3
    assert found["ratio"] > 1
    assert found["memory_holds"]


@linux
@pytest.mark.slow
def test_capture_of_cbt_small_stays_within_3_gib():
    options = interpret_cost.Options()
    plain, captured, trained = (interpret_cost.in_a_process(options, name) for name in interpret_cost.PASSES)
    assert plain < captured <= trained <= interpret_cost.MEMORY_LIMIT_GIB
    assert captured > 0.2  # twelve layers' tokens and attention alone are more
