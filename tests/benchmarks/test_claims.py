"""The claims: runs are done once and recorded, verdicts follow from intervals, the page states the records."""

import fcntl
import hashlib
import json
from pathlib import Path

import pytest
from benchmarks.claims import identities, judges, page, plots, runs
from benchmarks.claims.runs import Measured, Run
from benchmarks.estimates import Estimate, difference, mean_of, paired_difference
from scipy import stats

ROOT = Path(__file__).parents[2]


@pytest.fixture
def results(tmp_path, monkeypatch):
    folder = tmp_path / "results"
    monkeypatch.setattr(runs, "RESULTS", folder)
    monkeypatch.setattr(judges, "RESULTS", folder)
    return folder


def fake(name, order, log, **options):
    def measure():
        order.append(name)
        return Measured({"value": 1 / 3}, log)

    return Run(name, 1.0, measure, **options)


def test_runs_are_done_once_in_order_of_need_and_recorded(tmp_path, results):
    log = tmp_path / "log"
    log.write_text("epoch 1")
    order = []
    both = [fake("second", order, log, needs=("first",), seed=3), fake("first", order, log)]
    runs.work_through(both, tmp_path / "locks")
    assert order == ["first", "second"]
    record = json.loads((results / "second.json").read_text())
    assert record["value"] == 0.333333
    assert record["seed"] == 3
    assert record["log_sha256"] == hashlib.sha256(b"epoch 1").hexdigest()
    assert record["command"].endswith("--only second")
    assert record["minutes"] >= 0
    runs.work_through(both, tmp_path / "locks")
    assert order == ["first", "second"]


def test_a_run_of_another_process_is_left_to_it(tmp_path, results, monkeypatch):
    log = tmp_path / "log"
    log.write_text("")
    order = []
    locks = tmp_path / "locks"
    locks.mkdir()
    taken = (locks / "first.lock").open("w")
    fcntl.flock(taken, fcntl.LOCK_EX)
    monkeypatch.setattr(runs.time, "sleep", lambda _: taken.close())  # the other process ends
    runs.work_through([fake("first", order, log), fake("second", order, log)], locks)
    assert order == ["second", "first"]


def test_a_run_whose_needs_were_left_out_is_refused(tmp_path, results):
    alone = fake("second", [], tmp_path / "log", needs=("first",))
    with pytest.raises(SystemExit, match="second needs first: not done, and not among"):
        runs.work_through([alone], tmp_path / "locks")


@pytest.mark.parametrize(
    ("value", "half", "verdict"),
    [(2, 1, "holds"), (-2, 1, "does not hold"), (1, 2, "cannot be told"), (5, None, "cannot be told")],
)
def test_verdicts_follow_from_intervals(value, half, verdict):
    assert judges.is_positive(Estimate(value, half)) == verdict


def test_intervals_are_students_and_welchs():
    assert mean_of([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.48414), rel=1e-5)
    assert mean_of([1.0]) == (1.0, None)
    found = difference([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert found.value == -2.0
    interval = stats.ttest_ind([1, 2, 3], [2, 4, 6], equal_var=False).confidence_interval()
    assert (found.value - found.half, found.value + found.half) == pytest.approx(interval, rel=1e-9)
    assert difference([1.0], [2.0, 3.0]).half is None
    paired = paired_difference([1.0, 2.0, 4.0], [2.0, 4.0, 5.0])
    interval = stats.ttest_rel([1, 2, 4], [2, 4, 5]).confidence_interval()
    assert (paired.value - paired.half, paired.value + paired.half) == pytest.approx(interval, rel=1e-9)


def test_a_comparison_is_of_the_seeds_that_both_have():
    def seeds(**values):
        return [{"seed": int(seed[1:]), "test_top1": value} for seed, value in values.items()]

    assert judges.compare(seeds(s0=0.9), seeds(s1=0.8), judges.top1) is None
    alone = judges.compare(seeds(s0=0.9), seeds(s0=0.8, s1=0.7), judges.top1)
    assert alone == ("+10.00 points (90.00 % against 80.00 %; one seed)", "cannot be told")
    found = judges.compare(seeds(s2=0.93, s1=0.91, s0=0.92), seeds(s1=0.71, s2=0.732), judges.top1)
    assert found.verdict == "holds"
    assert found.figure.startswith("+19.90 ± 1.27 points (92.00 ± 12.71 % against 72.10")  # paired
    assert "2 seeds" in found.figure


@pytest.mark.parametrize(
    "name", ["gradient", "softmax_attention", "linear_attention", "channel_attention", "agent_attention"]
)
def test_equations_hold_in_double_precision(name):
    assert getattr(identities, name)() < judges.TOLERANCE


def test_the_page_states_the_records(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = page.DOCS.read_text()
    for (begin, end), content in ((page.TABLE, page.table()), (page.PICTURES, plots.pictures())):
        assert text.split(begin)[1].split(end)[0] == content
    assert len(page.CLAIMS) >= 14


def test_records_say_how_they_came_about():
    for path in sorted((ROOT / runs.RESULTS).glob("*.json")):
        record = json.loads(path.read_text())
        assert record["name"] == path.stem
        assert record["command"].startswith("python -m benchmarks.claims ")
        assert record["minutes"] > 0
        assert len(record["log_sha256"]) == 64
        assert record["environment"]["commit"]
