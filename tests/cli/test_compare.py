"""``cbsa compare``."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from cbsa_torch.cli import main, runs
from tests.helpers.pages import maps_of

FEW = ["--images", "8", "--shown", "2", "--robustness-images", "4"]


def test_it_writes_one_page_about_all(trained, trained_vit, tmp_path, capsys):
    output = tmp_path / "out"
    names = [str(trained), str(trained_vit)]
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
    panels = maps_of(output / "compare.html")
    sources = [[image["source"] for image in data["images"]] for data in panels]
    assert sources[0] == sources[1]  # the same images


def test_runs_of_one_folder_name_are_told_apart(trained, tmp_path, monkeypatch):
    def page(runs, output, **options):
        names.extend(run.name for run in runs)
        return SimpleNamespace(page=output)

    twin, names = tmp_path / "cbt", []
    shutil.copytree(trained, twin)
    monkeypatch.setattr("cbsa_torch.cli.compare.compare", page)
    assert main(["compare", str(trained), str(twin), *FEW]) == 0
    assert names == [str(trained), str(twin)]


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
def test_it_refuses_in_one_line(trained, trained_on_folder, names, message, tmp_path, capsys):
    runs = {"cbt": trained, "folder": trained_on_folder}
    given = [str(runs.get(name, tmp_path / name)) for name in names]
    assert main(["compare", *given, "--output", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("cbsa: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_it_refuses_another_name_of_the_same_run(trained, tmp_path, capsys):
    (tmp_path / "link").symlink_to(trained)
    for twin in (f"{trained}/", str(trained / ".." / "cbt"), str(tmp_path / "link")):
        assert main(["compare", str(trained), twin, "--output", str(tmp_path / "out")]) == 1
        assert f"a run is given twice: {trained} and {twin}" in capsys.readouterr().err


def test_it_refuses_other_classes(trained, trained_vit, tmp_path, capsys, monkeypatch):
    opened = runs.open_run

    def other_classes(checkpoint):
        run = opened(checkpoint)
        return run._replace(class_names=["a", "b"]) if checkpoint == str(trained_vit) else run

    monkeypatch.setattr(runs, "open_run", other_classes)
    assert main(["compare", str(trained), str(trained_vit), "--output", str(tmp_path / "out")]) == 1
    assert "different classes: 0, 1, 2, 3, 4 and 5 more; a, b" in capsys.readouterr().err
