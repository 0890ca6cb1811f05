"""The benchmark of the costs: that it measures, and what it measured against the limits."""

import json
import sys
from pathlib import Path

import pytest
from benchmarks import interpret_cost

ROOT = Path(__file__).parents[2]
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


def test_the_recorded_costs_keep_the_limits_and_are_those_of_the_docs():
    found = json.loads((ROOT / "benchmarks/results/interpret_cost.json").read_text())
    assert found["options"]["model"] == "cbt_small_patch16_224"
    assert (found["options"]["batch_size"], found["options"]["image_size"]) == ("16", "224")
    assert found["gib"]["plain"] < found["gib"]["capture"] < found["gib"]["capture_training"] <= 3
    assert sorted(found["ratios"])[len(found["ratios"]) // 2] == found["ratio"] <= 3
    assert found["memory_holds"]
    assert found["time_holds"]
    docs = (ROOT / "docs/interpret.md").read_text()
    gib = found["gib"]
    assert f"{gib['capture']:.1f} GiB ({gib['capture_training']:.1f} GiB with gradients on)" in docs
    assert f"{found['ratio']:.1f} times the plain forward pass" in docs


@linux
@pytest.mark.slow
def test_capture_of_cbt_small_stays_within_3_gib():
    options = interpret_cost.Options()
    plain, captured, trained = (interpret_cost.in_a_process(options, name) for name in interpret_cost.PASSES)
    assert plain < captured <= trained <= interpret_cost.MEMORY_LIMIT_GIB
    assert captured > 0.2  # twelve layers' tokens and attention alone are more
