"""``cbsa export``."""

import json

import torch

from cbsa_torch.cli import main
from cbsa_torch.train import open_trained
from cbsa_torch.train.tasks.classification import Classification
from tests.helpers.compare import assert_close
from tests.helpers.exports import open_program


def test_a_program_with_its_report_and_preprocessing(trained, tmp_path, capsys):
    folder = tmp_path / "program"
    command = ["export", "--checkpoint", str(trained), "--output", str(folder), "--format", "torch"]
    assert main([*command, "--any-size", "--num-representatives", "4", "4"]) == 0
    assert "program: " in capsys.readouterr().out
    assert sorted(file.name for file in folder.iterdir()) == ["model.pt2", "parity.json", "preprocessing.json"]
    parity = json.loads((folder / "parity.json").read_text())
    assert len(parity["parity"]) == 16
    assert max(row["error"] for row in parity["parity"]) <= parity["tolerance"] == 1e-5
    assert parity["num_representatives"] == [4, 4]
    assert parity["changed_by_num_representatives"] < 1e-6  # 16 of 8 x 8 pixels are 4 x 4
    told = json.loads((folder / "preprocessing.json").read_text())
    spec = open_trained(trained).spec
    assert told["class_names"] == [str(i) for i in range(10)]
    assert (told["mean"], told["std"]) == (list(spec.mean), list(spec.std))
    assert told["input"]["any_size"]
    images = torch.randn(2, 1, 9, 5)
    model = open_trained(trained).model.eval()
    for module in model.modules():
        if hasattr(module, "num_representatives"):
            module.num_representatives = (4, 4)
    with torch.no_grad():
        assert_close(open_program(folder / "model.pt2")(images), model(images), 1e-5)
    assert main(command) == 1
    assert "model.pt2 is there already: --overwrite replaces it" in capsys.readouterr().err


def test_what_it_refuses(trained, trained_vit, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "program"
    for run, options, message in (
        (trained, ["--any-size"], "num_representatives must be a grid such as (8, 8) for any_size, got 16"),
        (trained_vit, ["--num-representatives", "2", "2"], "num_representatives is of pooled representatives"),
        (trained, ["--image-size", "8", "0"], "--image-size must be one or two positive numbers"),
        (trained, ["--format", "torch", "--tolerance", "0"], "differs from the model"),
    ):
        assert main(["export", "--checkpoint", str(run), "--output", str(folder), *options]) == 1
        assert message in capsys.readouterr().err
    monkeypatch.setattr(Classification, "takes_images", False)
    assert main(["export", "--checkpoint", str(trained), "--output", str(folder)]) == 1
    assert "cbsa export takes models of images" in capsys.readouterr().err
    assert not folder.exists()
