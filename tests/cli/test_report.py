"""``cbsa report``."""

import json
import re
import shutil

import pytest

from cbsa_torch.cli import main
from cbsa_torch.train import evaluate
from cbsa_torch.train.data import splits
from cbsa_torch.train.tasks import classification
from tests.helpers.pages import maps_of

FEW = ["--images", "8", "--shown", "2", "--robustness-images", "4"]


def test_it_measures_and_shows_maps_of_the_images_given(run, digit, capsys):
    assert main(["report", "--checkpoint", str(run), str(digit), *FEW]) == 0
    accuracy = json.loads((run / "eval_test.json").read_text())["top1"]
    out = capsys.readouterr().out
    assert f"test accuracy: {accuracy:.4f}" in out
    assert f"report: {run / 'report.html'}" in out
    assert f"{100 * accuracy:.2f}" in (run / "report.html").read_text()
    (data,) = maps_of(run / "report.html")
    titles = [image["title"] for image in data["images"]]
    assert len(titles) == 3
    assert re.fullmatch(r"digit\.png: \d", titles[0])
    numbers = json.loads((run / "report.json").read_text())
    assert numbers["coding_rate"]["images"] == 8
    assert numbers["robustness_images"] == 4
    assert "GFLOPs" in numbers["facts"]
    assert numbers["evaluation"]["top1"] == accuracy


@pytest.mark.parametrize(("name", "split"), [("trained_vit", "test"), ("trained_on_folder", "val")])
def test_it_opens_weights_and_data_once(name, split, request, tmp_path, monkeypatch, capsys):
    run, calls = tmp_path / "run", []
    shutil.copytree(request.getfixturevalue(name), run)
    for module, called in (
        (evaluate, "open_weights"),
        (classification, "open_splits"),
        (splits, "open_splits"),
    ):
        original = getattr(module, called)

        def counted(*args, called=called, original=original, **kwargs):
            calls.append(called)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, called, counted)
    assert main(["report", "--checkpoint", str(run), *FEW, "--robustness-images", "0"]) == 0
    assert calls == ["open_weights", "open_splits"]
    assert f"{split} accuracy: " in capsys.readouterr().out
    assert "Robustness: switched off." in (run / "report.html").read_text()


def test_a_run_given_as_an_image_is_told_apart(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert capsys.readouterr().err.strip().endswith(f"a run is named by --checkpoint {tmp_path}")


def test_it_stops_at_what_is_no_image(run, digit, tmp_path, capsys):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not an image")
    assert main(["report", "--checkpoint", str(run), str(digit), str(bad)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("cbsa: ")
    assert "bad.png" in err
    assert err.count("\n") == 1
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(("option", "least"), [("--images", 1), ("--shown", 1), ("--robustness-images", 0)])
def test_counts_too_small_are_refused(option, least, capsys):
    for command in (["report"], ["compare", "x", "y"]):
        assert main([*command, option, str(least - 1)]) == 1
        assert capsys.readouterr().err == f"cbsa: {option} must be at least {least}, got {least - 1}\n"
