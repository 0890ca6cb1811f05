"""``cbsa predict`` of slides: a table, and maps whose numbers are the class token's attention."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from cbsa_torch.cli import main
from cbsa_torch.interpret import capture
from cbsa_torch.train import open_trained, train
from cbsa_torch.train.tasks.slides.bags import read_for
from tests.helpers.slides import slides_config, write_slides


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli_slides")
    config = slides_config(write_slides(folder / "features"), folder / "run")
    config.optim.epochs = 1
    train(config)
    return folder


def test_predict_writes_a_table_and_maps(run, tmp_path, capsys):
    slides = [str(run / "features" / name) for name in ("s01.h5", "s02.h5")]
    command = ["predict", "--checkpoint", str(run / "run"), *slides, "--maps", str(tmp_path / "maps")]
    assert main(command) == 0
    assert "probabilities: " in capsys.readouterr().out
    with (tmp_path / "maps" / "predictions.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["slide"] for row in table] == slides
    for row in table:
        assert float(row["normal"]) + float(row["tumour"]) == pytest.approx(1, abs=1e-6)
        assert row["predicted"] == max(("normal", "tumour"), key=lambda name: float(row[name]))
    with (tmp_path / "maps" / "s01_map.csv").open() as file:
        numbers = list(csv.DictReader(file))
    trained = open_trained(run / "run")
    bag = read_for(trained.spec, run / "features" / "s01.h5")
    with capture(trained.model) as records, torch.no_grad():
        trained.model(bag.features[None], bag.coords[None])
    (record,) = records.values()
    attention = record.token_weights[0]  # (H, M, 1 + N)
    expected = torch.einsum("hm,hmn->hn", attention[..., 0], attention)[:, 1:].mean(
        0
    )  # A A^T, the class token's row
    np.testing.assert_allclose([float(row["attention"]) for row in numbers], expected, atol=1e-6)
    assert [(int(row["x"]), int(row["y"])) for row in numbers] == [
        tuple(place) for place in bag.coords.tolist()
    ]
    with Image.open(tmp_path / "maps" / "s01_map.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50

    assert main(command) == 1  # nothing is replaced unasked
    assert "is there already" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_commands_that_are_of_images_say_so(run, capsys):
    assert main(["report", "--checkpoint", str(run / "run")]) == 1
    assert "pages show images, and this model takes slides" in capsys.readouterr().err
    assert main(["eval", "--checkpoint", str(run / "run"), "--max-bad-images", "3"]) == 1
    assert "--max-bad-images is of images" in capsys.readouterr().err
    for command in (["eval"], ["predict", "a.h5"]):
        assert main([*command, "--checkpoint", str(run / "run"), "--native"]) == 1
        assert "native has no effect for the task 'slides'" in capsys.readouterr().err
    assert main(["predict", "--checkpoint", str(run / "run"), "a.h5", "--masks", "x"]) == 1
    assert "masks has no effect for the task 'slides'" in capsys.readouterr().err
    assert main(["predict", "--checkpoint", str(run / "run"), str(run / "a.h5")]) == 1
    assert "a.h5" in capsys.readouterr().err
    stream = ["predict", "--checkpoint", str(run / "run"), "--stream", str(run / "features" / "s01.h5")]
    assert main([*stream, "--stream-channels", "first"]) == 1
    assert "stream_channels is of images" in capsys.readouterr().err


def test_eval(run, capsys):
    assert main(["eval", "--checkpoint", str(run / "run")]) == 0
    assert "balanced accuracy" in capsys.readouterr().out


def test_a_slide_that_is_streamed_is_classified_the_same(run, tmp_path, capsys):
    slide, output = str(run / "features" / "s03.h5"), tmp_path / "out.json"
    command = ["predict", "--checkpoint", str(run / "run"), "--output", str(output)]
    rows = []
    for given in (
        [slide, "--maps", str(tmp_path / "maps")],
        ["--stream", slide, "--stream-folder", str(tmp_path / "streamed"), "--stream-results", "map"],
    ):
        assert main([*command, *given]) == 0
        rows += json.loads(output.read_text())
    whole, streamed = rows
    assert whole["classes"] == streamed["classes"]
    assert whole["probabilities"] == pytest.approx(streamed["probabilities"], abs=1e-5)
    with (tmp_path / "maps" / "s03_map.csv").open() as file:
        numbers = [float(row["attention"]) for row in csv.DictReader(file)]
    assert np.load(tmp_path / "streamed" / "map.npy").mean(0) == pytest.approx(numbers, rel=1e-3)
    with Image.open(tmp_path / "streamed" / "map.png") as picture:
        assert min(picture.size) > 1
    assert main([*command, "--stream", slide, "--maps", "maps"]) == 1
    assert "maps has no effect with stream" in capsys.readouterr().err
