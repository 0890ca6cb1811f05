"""``cbsa export``."""

import json

import pytest
import torch

from cbsa_torch.cli import main
from cbsa_torch.train import open_trained, recover, train
from cbsa_torch.train.tasks.classification import Classification
from tests.helpers.compare import assert_close
from tests.helpers.exports import open_program
from tests.helpers.masked_folder import NAMES, tiny_segmentation, write_masked_folder
from tests.helpers.small_vit import adapt_config, vit_config


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


def exported(run, folder, *options):
    """The ONNX graph of a run, which is what is written if nothing else is asked for, and what is told of it."""
    assert main(["export", "--checkpoint", str(run), "--output", str(folder), *options]) == 0
    assert json.loads((folder / "parity.json").read_text())["format"] == "onnx"
    return open_program(folder / "model.onnx"), json.loads((folder / "preprocessing.json").read_text())


@torch.no_grad()
def test_a_graph_of_one_size(trained_vit, tmp_path):
    program, told = exported(trained_vit, tmp_path / "program")
    assert (told["input"]["any_size"], told["input"]["height"], told["input"]["width"]) == (False, 8, 8)
    images = torch.randn(5, 1, 8, 8)
    assert_close(program(images), open_trained(trained_vit).model.eval()(images), 1e-5)
    with pytest.raises(Exception, match="Got: 9 Expected: 8"):
        program(torch.randn(1, 1, 8, 9))


@pytest.mark.slow
@torch.no_grad()
def test_runs_of_other_tasks(tmp_path):
    with torch.enable_grad():
        vit = train(vit_config(tmp_path / "vit")).folder
        adapted = recover(adapt_config(vit, tmp_path / "adapted")).folder
        segmenter = train(tiny_segmentation(write_masked_folder(tmp_path / "scenes"), tmp_path / "run")).folder
    program, told = exported(adapted, tmp_path / "digits")
    assert told["class_names"] == [str(i) for i in range(10)]
    images = torch.randn(2, 1, 8, 8)
    assert_close(program(images), open_trained(adapted).model.eval()(images), 1e-5)
    # its own rounding in float32 is above 1e-5: the norm of its masks divides by what tells classes apart
    program, told = exported(segmenter, tmp_path / "masks", "--tolerance", "1e-4")
    assert (told["task"], told["class_names"]) == ("segmentation", NAMES)
    images = torch.randn(2, 3, told["input"]["height"], told["input"]["width"])
    assert_close(program(images), open_trained(segmenter).model.eval()(images), 1e-4)


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
