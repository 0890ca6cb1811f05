"""Names of classes and files that look like markup, or are not UTF-8, through all commands."""

from __future__ import annotations

import html
import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from cbsa_torch.cli import main

MARKUP = ["[object]", "[bold red]", "<script>x", "{{ x }} $y_z^"]
BYTES = [b"caf\xe8", b"caf\xe9", b"\xff"]
SHOWN = {"markup": MARKUP, "bytes": [r"caf\xe8", r"caf\xe9", r"\xff"]}
FILE = {"markup": "photo [final] :cat:.png", "bytes": os.fsdecode(b"t\xeate.png")}
FILE_SHOWN = {"markup": FILE["markup"], "bytes": r"t\xeate.png"}


@pytest.fixture(scope="module", params=list(SHOWN))
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def named(kind, tmp_path_factory, tiny) -> Path:
    """A run on folders of such names, in one."""
    root = tmp_path_factory.mktemp("named") / FILE[kind].removesuffix(".png")
    names = MARKUP if kind == "markup" else [os.fsdecode(name) for name in BYTES]
    for i, name in enumerate(sorted(names)):
        for split in ("train", "val"):
            (root / split / name).mkdir(parents=True)
            for j in range(4):
                Image.new("L", (8, 8), 60 * i + 5 * j).save(root / split / name / f"{j}.png")
    output = root.with_name(f"run {root.name}")
    options = ["--config", "folder", "--data.root", str(root), "--output", str(output)]
    options += [*tiny, "--optim.batch-size", "8", "--engine.tracker", "none"]
    assert main(["train", *options, "--model", "cbt_pico_patch1_8"]) == 0
    return output


def test_training_writes_a_card_of_them(kind, named):
    card = (named / "README.md").read_text(encoding="utf-8")
    assert card.count("| class |") == 1
    if kind == "bytes":
        assert r"caf\\xe8" in card


def test_predict(kind, named, tmp_path, capsys):
    file = tmp_path / FILE[kind]
    Image.new("L", (8, 8)).save(file)
    output = tmp_path / "out.json"
    assert main(["predict", str(file), "--checkpoint", str(named), "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert FILE_SHOWN[kind] in out
    assert all(name in out for name in SHOWN[kind])
    assert json.loads(output.read_text())[0]["image"] == str(file)


def test_predict_names_a_file_that_is_missing(kind, named, tmp_path, capsys):
    assert main(["predict", str(tmp_path / FILE[kind]), "--checkpoint", str(named)]) == 1
    assert FILE_SHOWN[kind] in capsys.readouterr().err


@pytest.mark.slow
def test_report_and_compare(kind, named, tmp_path, capsys):
    file = tmp_path / "images" / FILE[kind]
    file.parent.mkdir()
    Image.new("L", (8, 8)).save(file)
    options = ["--images", "8", "--shown", "6", "--robustness-images", "0"]
    assert main(["report", str(file), "--checkpoint", str(named), *options]) == 0
    twin = shutil.copytree(named, tmp_path / "twin [final]")
    assert main(["compare", str(named), str(twin), "--output", str(tmp_path / "both"), *options]) == 0
    report, comparison = (
        path.read_text(encoding="utf-8") for path in (named / "report.html", tmp_path / "both" / "compare.html")
    )
    assert html.escape(FILE_SHOWN[kind], quote=False) in report
    assert "twin [final]" in comparison
    assert "<script>x" not in report + comparison
    assert "report: " in capsys.readouterr().out

    shutil.copytree(named, tmp_path / f"x{FILE[kind]}")
    runs = [str(named), str(tmp_path / f"x{FILE[kind]}"), "--output", str(tmp_path / "out")]
    assert main(["compare", *runs, *options]) == 0
    page = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert html.escape(f"run {FILE_SHOWN[kind].removesuffix('.png')}", quote=False) in page


def test_eval(named, capsys):
    assert main(["eval", "--checkpoint", str(named), "--split", "val"]) == 0
    assert "val accuracy" in capsys.readouterr().out
