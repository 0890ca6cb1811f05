"""The small block: one run of it, computed anew, gives its committed record."""

import json
from pathlib import Path

import pytest
from benchmarks.claims import runs, small
from benchmarks.claims.runs import Folders

ROOT = Path(__file__).parents[2]


def committed(name):
    return json.loads((ROOT / runs.record_of(name)).read_text())


def test_lines_are_pressed_as_recorded(tmp_path):
    values = small.compress(Folders(runs=tmp_path), 0).values
    record = committed("small_lines_seed0")
    for when in ("before", "after"):
        assert values[when] == pytest.approx(record[when], rel=1e-5)


@pytest.mark.slow
def test_digits_are_learned_as_recorded(tmp_path):
    values = small.train_digits(Folders(runs=tmp_path), 0).values
    record = committed("small_digits_seed0")
    assert values["test_images"] == record["test_images"]
    assert values["test_top1"] == pytest.approx(
        record["test_top1"], abs=0.02
    )  # other processors round otherwise
    ours, theirs = (one["inside"]["certificates"]["float64"] for one in (values, record))
    assert ours["holding"] == ours["cases"] == theirs["cases"]
    assert ours["share"] == pytest.approx(theirs["share"], rel=0.1)
    assert values["inside"]["rate"] == pytest.approx(record["inside"]["rate"], rel=0.1)
