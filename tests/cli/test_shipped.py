"""Commands on the weights that come with the package: at once, without training, and writing nothing into it."""

import json

import pytest
from PIL import Image

from cbsa_torch.cli import main
from cbsa_torch.models.shipped import SHIPPED
from tests.helpers.runs import contents

NAME = "cbt_pico_patch1_8.certified_digits"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The digits as files."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    assert main(["data", "images", "digits", "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory; the folder of the weights must stay as it is."""
    before = contents(SHIPPED[NAME].folder)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert contents(SHIPPED[NAME].folder) == before


def test_digits_are_written_as_a_folder_of_images(digits, tmp_path, capsys):
    counts = {split: len(list((digits / split).rglob("*.png"))) for split in ("train", "val", "test")}
    assert counts == {"train": 1257, "val": 180, "test": 360}
    assert main(["data", "check", str(digits), "--data.workers", "0", "--model.name", "cbt_pico_patch1_8"]) == 0
    assert "test: 360 images" in capsys.readouterr().out
    with Image.open(next((digits / "test" / "3").iterdir())) as image:
        assert (image.mode, image.size, image.getextrema()[1]) == ("L", (8, 8), 255)
    before = contents(digits)
    assert main(["data", "images", "digits", "--output", str(digits)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["data", "images", "digit", "--output", str(tmp_path / "x")]) == 1
    assert "did you mean 'digits'?" in capsys.readouterr().err
    assert contents(digits) == before
    assert not (tmp_path / "x").exists()


def test_predict(here, digits):
    files = [str(next((digits / "test" / str(label)).iterdir())) for label in range(10)]
    assert main(["predict", "--checkpoint", NAME, *files, "--output", "out.json"]) == 0
    predictions = json.loads((here / "out.json").read_text())
    assert sum(p["classes"][0] == str(label) for label, p in enumerate(predictions)) >= 9


def test_report_goes_into_runs(here, digits, capsys):
    image = str(next((digits / "test" / "7").iterdir()))
    few = ["--images", "16", "--shown", "1", "--robustness-images", "0"]
    assert main(["report", "--checkpoint", NAME, *few, image]) == 0
    record = json.loads((SHIPPED[NAME].folder / "eval_test.json").read_text())
    folder = here / "runs" / NAME
    assert f"test accuracy: {record['top1']:.4f}" in capsys.readouterr().out
    assert json.loads((folder / "eval_test.json").read_text())["confusion"] == record["confusion"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "80 epochs of lion" in page  # the record of its training
    assert main(["eval", "--checkpoint", NAME, "--split", "val"]) == 0
    assert (folder / "eval_val.json").exists()


def test_a_folder_of_that_name_comes_first(run, here, capsys):
    run.rename(here / NAME)
    assert main(["eval", "--checkpoint", NAME]) == 0
    assert (here / NAME / "eval_test.json").exists()
    assert not (here / "runs").exists()


def test_what_is_not_there_names_what_is(here, capsys):
    assert main(["report"]) == 1
    assert f"no checkpoint at runs/digits: `cbsa train` makes one; {NAME} comes with" in capsys.readouterr().err
    assert main(["list", "--kind", "models"]) == 0
    assert f"  {NAME}: CBSA with certified steps" in capsys.readouterr().out
