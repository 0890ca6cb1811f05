"""The block of models from scratch, on a few made-up images, from the first trial to the speed."""

import json
import sys

import pytest
from benchmarks.claims import __main__ as command
from benchmarks.claims import runs, scratch
from benchmarks.claims.scratch import Form

from tests.helpers.colour_folder import write_split


@pytest.fixture
def small(tmp_path, monkeypatch):
    write_split(tmp_path / "cifar/train", 26)
    write_split(tmp_path / "cifar/test", 4, seed=1)
    sizes = {"RATES": (5e-4, 1e-3), "SEEDS": (1,), "EPOCHS": 2, "TRIAL_EPOCHS": 1, "MEASURED": 4, "TIMED": 2}
    for name, value in {**sizes, "FORMS": {"certified": Form("cbt", {"step": "certified"})}}.items():
        monkeypatch.setattr(scratch, name, value)
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
    return tmp_path


def do(folder, monkeypatch, *options):
    places = ["--cifar", str(folder / "cifar"), "--runs", str(folder / "runs")]
    monkeypatch.setattr(sys, "argv", ["claims", "scratch", *places, *options])
    command.main()


def test_the_command_does_what_is_left(small, monkeypatch, capsys):
    do(small, monkeypatch, "--list")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        *("scratch_certified_lr0.0005", "scratch_certified_lr0.001"),
        "scratch_certified_seed1",
    ]
    do(small, monkeypatch)
    do(small, monkeypatch, "--only", "scratch_speed")
    record = runs.read("scratch_certified_seed1")
    assert (
        record["command"] == "python -m benchmarks.claims scratch --cifar PATH --only scratch_certified_seed1"
    )
    trials = [runs.read(scratch.trial("certified", rate)) for rate in scratch.RATES]
    assert record["lr"] == max(trials, key=lambda trial: trial["val_top1"])["lr"]
    assert record["seed"] == 1
    certified = record["inside"]["certificates"]["float64"]
    assert certified["holding"] == certified["cases"] > 0
    assert len(record["inside"]["step"]["layers"]) == len(record["inside"]["rate"])
    rows = runs.read("scratch_speed")["rows"]
    assert [row["training"] for row in rows] == [False, True]
    assert all(row["quartiles"][0] <= 2000 / row["images_per_second"] <= row["quartiles"][1] for row in rows)
    assert len((small / "runs/scratch_certified_seed1/metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((small / "results/scratch_speed.json").read_text())["batch"] == 2
