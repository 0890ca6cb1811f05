"""``cbsa export``."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cbsa_torch.cli import main
from cbsa_torch.train import SegmentationTrainConfig, TrainConfig, open_trained, recover, train
from cbsa_torch.train.data import InputSpec
from cbsa_torch.train.tasks.classification import Classification
from cbsa_torch.train.tasks.segmentation.task import Segmentation
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


def write_pictures(folder):
    """Of several aspects and kinds."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (30, 57, 4), dtype=np.uint8)
    Image.fromarray(pixels[..., :3]).save(folder / "wide.png")
    Image.fromarray(pixels[..., 0].T.copy()).save(folder / "tall.png")
    Image.fromarray(pixels).save(folder / "clear.png")
    turned = Image.Exif()
    turned[0x112] = 6
    Image.fromarray(pixels[..., :3]).save(folder / "turned.png", exif=turned)
    Image.fromarray(random.integers(0, 65536, (41, 37)).astype(np.uint16)).save(folder / "deep.png")
    return sorted(folder.glob("*.png"))


def prepared(file, told):
    """The input of a program, as its ``preprocessing.json`` says, by Pillow and NumPy alone."""
    image = ImageOps.exif_transpose(Image.open(file))
    assert told["decoding"] == {
        "orientation": "as EXIF says", "transparency": "over grey 128", "16 bits": "the high byte"
    }  # fmt: skip
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, (128, 128, 128, 255)), image)
    image = image.convert({"grey": "L", "RGB": "RGB"}[told["input"]["colours"]])
    (cover, _), (height, width) = told["geometry"]["resize_to_cover"], told["geometry"]["crop_at_the_centre"]
    assert told["geometry"]["interpolation"] == "bicubic"
    size = [side * cover // min(image.size) for side in image.size]
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    values = np.asarray(image.crop((left, top, left + width, top + height)), np.float32).reshape(
        height, width, -1
    )
    return torch.from_numpy(((values / 255 - told["mean"]) / told["std"]).astype(np.float32)).permute(2, 0, 1)


def test_a_program_and_its_preprocessing_predict_as_the_command_does(trained, tmp_path):
    program, output = tmp_path / "program", tmp_path / "predictions.json"
    files = write_pictures(tmp_path)
    command = ["--checkpoint", str(trained), "--output"]
    assert main(["export", *command, str(program), "--format", "torch"]) == 0
    assert main(["predict", *map(str, files), *command, str(output), "--top", "10"]) == 0
    told = json.loads((program / "preprocessing.json").read_text())
    run = open_program(program / "model.pt2")
    for file, row in zip(files, json.loads(output.read_text()), strict=True):
        found = dict(
            zip(told["class_names"], run(prepared(file, told)[None]).softmax(-1)[0].tolist(), strict=True)
        )
        for name, probability in zip(row["classes"], row["probabilities"], strict=True):
            assert abs(found[name] - probability) < 1e-6


def test_geometry_of_images_that_are_not_resized(trained, tmp_path, capsys, monkeypatch):
    spec = InputSpec((3, 32, 48), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.8, 4, True)
    config = TrainConfig()
    assert Classification(config).geometry(spec) == {
        "resize_to_cover": [40, 60], "interpolation": "bicubic", "crop_at_the_centre": [32, 48]
    }  # fmt: skip
    config.data.native, config.data.max_image_tokens = True, 65
    native = Classification(config).geometry(spec)
    assert native["own_size"] == {"sides_are_multiples_of": 4, "at_most_patches": 64}
    config = SegmentationTrainConfig()
    config.data.crop_size, config.windows.stride = 32, 24
    assert Segmentation(config).geometry(spec)["windows"]["side"] == 32
    assert Segmentation(config).geometry(spec)["windows"]["stride"] == 24
    config.windows.native, config.windows.stride = True, None
    assert "own_size" in Segmentation(config).geometry(spec)
    monkeypatch.setattr(Classification, "geometry", lambda *_: native)
    assert main(["export", "--checkpoint", str(trained), "--output", str(tmp_path)]) == 1
    assert "sees images at their own size: --any-size, or --image-size" in capsys.readouterr().err


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
