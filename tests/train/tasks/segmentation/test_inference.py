"""Evaluation and prediction of trained segmenters, by the library and by the commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cbsa_torch.cli import main
from cbsa_torch.models import load_checkpoint
from cbsa_torch.models.segmentation import multi_scale_logits, sliding_logits
from cbsa_torch.train import WindowOptions, evaluate_checkpoint, open_trained, predict_images
from cbsa_torch.train.errors import ConfigError, DataError
from cbsa_torch.train.run.folder import RunFolder
from tests.helpers.masked_folder import COUNTS, NAMES, write_masked_folder


def normalised(model_info, path):
    pixels = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(model_info["input"][key])[:, None, None] for key in ("mean", "std"))
    return (pixels - mean) / std


def confusion_by_hand(segmenter, logits_of):
    """Counts and mean loss, pixel by pixel, from files and weights alone."""
    model, info = load_checkpoint(RunFolder(segmenter.output).weights)
    counts, losses, pixels = np.zeros((3, 3), dtype=int), 0.0, 0
    for path in sorted((Path(segmenter.data.root) / "test/images").iterdir()):
        truth = np.asarray(Image.open(path.parent.parent / "masks" / path.name)).astype(int)
        logits = logits_of(model, normalised(info, path)).double()
        predicted = logits.argmax(0).numpy()
        for true, guess in zip(truth.ravel(), predicted.ravel(), strict=True):
            counts[true, guess] += 1
        chosen = logits.log_softmax(0).gather(0, torch.from_numpy(truth)[None])
        losses, pixels = losses - float(chosen.sum()), pixels + truth.size
    return counts, losses / pixels


@pytest.mark.parametrize("options", [{}, {"window": 20, "stride": 9}, {"scales": (0.5, 1.0), "flip": True}])
def test_evaluation_equals_a_count_by_hand(segmenter, options):
    result = evaluate_checkpoint(segmenter.output, windows=WindowOptions(**options))

    def logits(model, image):
        if "scales" in options:
            return multi_scale_logits(model, [image], 32, scales=(0.5, 1.0), flip=True)[0]
        return sliding_logits(model, [image], options.get("window", 32), options.get("stride"))[0]

    counts, loss = confusion_by_hand(segmenter, logits)
    assert result.scores.confusion == counts.tolist()
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.images == COUNTS["test"]
    several = "_multi_scale" if "scales" in options else ""
    record = json.loads((Path(segmenter.output) / f"eval_test{several}.json").read_text())
    assert record["miou"] == result.score
    assert list(record["classes"]) == NAMES


def test_the_command_prints_every_class(segmenter, capsys):
    assert main(["eval", "--checkpoint", segmenter.output, "--split", "val", "--window", "24", "--flip"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES)
    assert "val mean IoU: " in printed
    record = json.loads((Path(segmenter.output) / "eval_val_multi_scale.json").read_text())
    assert record["windows"]["size"] == 24


def test_other_data_is_given_by_its_folder(segmenter, tmp_path, capsys):
    root = write_masked_folder(tmp_path / "other")
    output = tmp_path / "scores.json"
    assert main(["eval", "--checkpoint", segmenter.output, "--root", str(root), "--output", str(output)]) == 0
    assert json.loads(output.read_text())["images"] == COUNTS["test"]
    (root / "classes.txt").write_text("a\nb\nc")
    assert main(["eval", "--checkpoint", segmenter.output, "--root", str(root), "--output", str(output)]) == 1
    assert "are not the model's" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(480, 640), (300, 500), (17, 90)])
def test_masks_of_images_of_any_size(segmenter, tmp_path, size):
    height, width = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    (found,) = predict_images(segmenter.output, [tmp_path / "photo.png"], masks=tmp_path / "masks")
    with Image.open(found.labels) as opened:
        labels = np.asarray(opened)
    with Image.open(found.mask) as opened:
        assert opened.size[1] >= height
    model, info = load_checkpoint(RunFolder(segmenter.output).weights)
    expected = sliding_logits(model, [normalised(info, tmp_path / "photo.png")], 32)[0].argmax(0).numpy()
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, expected)
    assert sum(found.shares.values()) == pytest.approx(1)


def test_the_command_writes_masks(segmenter, tmp_path, capsys):
    image = str(Path(segmenter.data.root) / "test/images/0.png")
    record, masks = tmp_path / "masks.json", tmp_path / "masks"
    arguments = [
        "predict",
        "--checkpoint",
        segmenter.output,
        image,
        "--masks",
        str(masks),
        "--output",
        str(record),
    ]
    assert main(arguments) == 0
    assert {path.name for path in masks.iterdir()} == {"0_mask.png", "0_labels.png"}
    assert json.loads(record.read_text())[0]["labels"].endswith("0_labels.png")
    assert "share of pixels" in capsys.readouterr().out


def test_masks_that_are_there_stay(segmenter, tmp_path, capsys):
    image, masks = str(Path(segmenter.data.root) / "test/images/0.png"), tmp_path / "masks"
    masks.mkdir()
    (masks / "0_labels.png").write_bytes(b"work of days")
    arguments = ["predict", "--checkpoint", segmenter.output, image, "--masks", str(masks)]
    assert main(arguments) == 1
    assert "0_labels.png is there already" in capsys.readouterr().err
    assert [path.read_bytes() for path in masks.iterdir()] == [b"work of days"]
    assert main([*arguments, "--overwrite"]) == 0
    assert len(list(masks.iterdir())) == 2
    with pytest.raises(ValueError, match="on_bad_image must be one of"):
        predict_images(segmenter.output, [image], masks=tmp_path / "other", on_bad_image="sikp")


def test_the_same_data_elsewhere_keep_their_layout(segmenter, tmp_path, capsys):
    arguments = ["eval", "--checkpoint", segmenter.output, "--output", str(tmp_path / "e.json")]
    root = str(write_masked_folder(tmp_path / "moved"))
    assert main([*arguments, "--root", root, "--data", "ade20k"]) == 1
    assert "moved/images is not a folder" in capsys.readouterr().err
    assert main([*arguments, "--root", root, "--data", "ade2k"]) == 1
    assert "did you mean 'ade20k'" in capsys.readouterr().err
    assert open_trained(segmenter.output).config.data.name == "folder"


def test_images_of_one_name_are_refused_before_any_is_read(segmenter, tmp_path):
    with pytest.raises(ConfigError, match=r"would both be written as a_mask\.png"):
        predict_images(segmenter.output, ["x/a.png", "y/a.jpg"], masks=tmp_path / "masks")
    assert not (tmp_path / "masks").exists()


def test_bad_images_stop_or_are_reported(segmenter, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad\.png"):
        predict_images(segmenter.output, [tmp_path / "bad.png"], masks=tmp_path / "masks")
    (found,) = predict_images(
        segmenter.output, [tmp_path / "bad.png"], masks=tmp_path / "masks", on_bad_image="skip"
    )
    assert "bad.png" in found.error
    assert found.mask is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"stride": 40}, r"stride must be in \[1, 32\], the window, got 40"),
        ({"scales": ()}, "scales must be numbers"),
        ({"scales": (0.0,)}, "scales must be numbers"),
    ],
)
def test_windows_that_cannot_work_are_refused(segmenter, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_checkpoint(segmenter.output, windows=WindowOptions(**options))


def test_a_report_shows_the_layers_of_encoder_and_decoder(segmenter, capsys):
    arguments = ["report", "--checkpoint", segmenter.output, "--shown", "2", "--images", "4"]
    assert main(arguments) == 0
    assert "test mean IoU: " in capsys.readouterr().out
    record = json.loads((Path(segmenter.output) / "report.json").read_text())
    assert record["coding_rate"]["layers"] == ["encoder.blocks.0.attn", "decoder.layers.0.attn"]
    assert record["evaluation"]["miou"] == evaluate_checkpoint(segmenter.output).score
    page = (Path(segmenter.output) / "report.html").read_text()
    assert "mean IoU on the 4 images of the test split" in page
    assert "Best validation mean IoU" in page


def test_comparisons_are_of_classifiers(segmenter, capsys):
    assert main(["compare", segmenter.output, segmenter.output]) == 1
    assert "is of the task 'segmentation'" in capsys.readouterr().err
