"""``cbsa report`` and ``cbsa compare``."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from cbsa_torch.cli import main
from cbsa_torch.train import evaluate
from cbsa_torch.train.tasks import classification

TINY = [
    *("--optim.batch-size", "256", "--optim.warmup-epochs", "0", "--optim.epochs", "1"),
    *("--model.args", "embed_dim", "8", "depth", "2", "num_heads", "2"),
]
FEW = ["--images", "8", "--shown", "2", "--robustness-images", "4"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Runs of three families on the digits, and one on other data; tests must not change their models."""
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for family in ("cbt", "crate", "stem_vit"):
        made[family] = folder / family
        args = ["--output", str(made[family]), "--model", f"{family}_pico_patch1_8"]
        assert main(["train", *args, *TINY]) == 0
    for i, name in enumerate(("dark", "light")):
        (folder / "images" / "train" / name).mkdir(parents=True)
        for j in range(4):
            Image.new("L", (8, 8), 180 * i + 5 * j).save(folder / "images" / "train" / name / f"{j}.png")
    made["folder"] = folder / "folder"
    args = ["--config", "folder", "--data.root", str(folder / "images"), "--data.workers", "0"]
    args += ["--model", "cbt_pico_patch1_8", "--output", str(made["folder"])]
    assert main(["train", *args, *TINY, "--optim.batch-size", "4"]) == 0
    return made


@pytest.fixture
def digit(tmp_path) -> Path:
    path = tmp_path / "digit.png"
    Image.fromarray(np.round(load_digits().images[0] * (255 / 16)).astype(np.uint8)).save(path)
    return path


@pytest.mark.parametrize(("run", "split"), [("cbt", "test"), ("folder", "val")])
def test_a_report_opens_its_weights_and_its_data_once(runs, run, split, tmp_path, monkeypatch, capsys):
    calls = []

    def count(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (calls.append(name), function(*a, **k))[1])

    count(evaluate, "load_checkpoint")
    count(classification, "open_splits")
    count(classification, "open_split")
    shutil.copytree(runs[run], tmp_path / "run")
    assert main(["report", "--checkpoint", str(tmp_path / "run"), *FEW]) == 0
    assert calls == ["load_checkpoint", "open_splits"]
    assert f"{split} accuracy: " in capsys.readouterr().out


def map_data(page: Path) -> list[dict]:
    return [
        json.loads(text)
        for text in re.findall(r'<script type="application/json">(.*?)</script>', page.read_text())
    ]


def test_report_shows_maps_of_the_images_given(runs, digit, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs["cbt"], run)
    assert main(["report", "--checkpoint", str(run), str(digit), *FEW]) == 0
    assert f"report: {run / 'report.html'}" in capsys.readouterr().out
    (data,) = map_data(run / "report.html")
    titles = [image["title"] for image in data["images"]]
    assert len(titles) == 3
    assert re.fullmatch(r"digit\.png: \d", titles[0])
    numbers = json.loads((run / "report.json").read_text())
    assert numbers["coding_rate"]["images"] == 8
    assert numbers["robustness_images"] == 4
    assert "GFLOPs" in numbers["facts"]
    accuracy = json.loads((run / "eval_test.json").read_text())["top1"]
    assert numbers["evaluation"]["top1"] == accuracy


@pytest.mark.parametrize("family", ["crate", "stem_vit"])
def test_report_of_other_families(runs, family, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[family], run)
    assert main(["report", "--checkpoint", str(run), *FEW, "--robustness-images", "0"]) == 0
    assert "Robustness: switched off." in (run / "report.html").read_text()


def test_a_run_given_as_an_image_is_told_apart(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert capsys.readouterr().err.strip().endswith(f"a run is named by --checkpoint {tmp_path}")


@pytest.mark.parametrize("content", [None, b"", b"not an image"])
def test_report_stops_at_what_is_no_image(runs, digit, tmp_path, content, capsys):
    bad, run = tmp_path / "bad.png", tmp_path / "run"
    if content is not None:
        bad.write_bytes(content)
    shutil.copytree(runs["cbt"], run)
    assert main(["report", "--checkpoint", str(run), str(digit), str(bad)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("cbsa: ")
    assert "bad.png" in err
    assert err.count("\n") == 1
    assert not (run / "report.html").exists()


def test_compare_writes_one_page_about_all(runs, tmp_path, capsys):
    output = tmp_path / "out"
    names = [str(runs[name]) for name in ("cbt", "stem_vit")]
    assert main(["compare", *names, "--output", str(output), *FEW]) == 0
    assert f"comparison: {output / 'compare.html'}" in capsys.readouterr().out
    numbers = json.loads((output / "compare.json").read_text())["runs"]
    assert [run["name"] for run in numbers] == ["cbt", "stem_vit"]
    assert [len(run["history"]) for run in numbers] == [1, 1]
    page = (output / "compare.html").read_text()
    for name, run in zip(names, numbers, strict=True):
        assert run["accuracy"] == json.loads((Path(name) / "eval_test.json").read_text())["top1"]
        assert f"{run['parameters']:,}" in page
        assert f"{100 * run['accuracy']:.2f} %" in page
        assert f"{run['coding_rate']['rate'][-1]:.1f}" in page
    panels = map_data(output / "compare.html")
    sources = [[image["source"] for image in data["images"]] for data in panels]
    assert sources[0] == sources[1]  # the same images


def test_runs_of_one_folder_name_are_told_apart(runs, tmp_path):
    twin = tmp_path / "cbt"
    shutil.copytree(runs["cbt"], twin)
    output = tmp_path / "out"
    args = ["compare", str(runs["cbt"]), str(twin), "--output", str(output), *FEW, "--robustness-images", "0"]
    assert main(args) == 0
    numbers = json.loads((output / "compare.json").read_text())["runs"]
    assert [run["name"] for run in numbers] == [str(runs["cbt"]), str(twin)]
    assert numbers[0]["robustness"] is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "compare needs two runs or more, got 0"),
        (["cbt"], "compare needs two runs or more, got 1"),
        (["cbt", "cbt"], "a run is given twice"),
        (["cbt", "folder"], "trained on different data: data.name is digits and folder"),
        (["cbt", "nowhere"], "nowhere"),
    ],
)
def test_compare_refuses_in_one_line(runs, names, message, tmp_path, capsys):
    given = [str(runs.get(name, tmp_path / name)) for name in names]
    assert main(["compare", *given, "--output", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("cbsa: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_compare_refuses_another_name_of_the_same_run(runs, tmp_path, capsys):
    (tmp_path / "link").symlink_to(runs["cbt"])
    for twin in (f"{runs['cbt']}/", str(runs["cbt"] / ".." / "cbt"), str(tmp_path / "link")):
        assert main(["compare", str(runs["cbt"]), twin, "--output", str(tmp_path / "out")]) == 1
        assert f"a run is given twice: {runs['cbt']} and {twin}" in capsys.readouterr().err


def test_compare_refuses_other_classes(runs, tmp_path, capsys, monkeypatch):
    from cbsa_torch.cli import runs as module

    opened = module.open_run

    def other_classes(checkpoint):
        trained = opened(checkpoint)
        return trained._replace(class_names=["a", "b"]) if "crate" in str(checkpoint) else trained

    monkeypatch.setattr(module, "open_run", other_classes)
    given = [str(runs[name]) for name in ("cbt", "crate")]
    assert main(["compare", *given, "--output", str(tmp_path / "out")]) == 1
    assert "different classes: 0, 1, 2, 3, 4, ... (10) and a, b (2)" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "least"), [("--images", 1), ("--shown", 1), ("--robustness-images", 0)])
def test_counts_too_small_are_refused(runs, option, least, capsys):
    for command in (["report", "--checkpoint", str(runs["cbt"])], ["compare", str(runs["cbt"]), "x"]):
        assert main([*command, option, str(least - 1)]) == 1
        assert capsys.readouterr().err == f"cbsa: {option} must be at least {least}, got {least - 1}\n"
