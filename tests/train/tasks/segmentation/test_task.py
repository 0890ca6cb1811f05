"""Segmenters train through the engine of all runs, are evaluated and predict masks."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from cbsa_torch.cli import main
from cbsa_torch.models import Segmenter, load_checkpoint
from cbsa_torch.models.checkpoint import CheckpointError
from cbsa_torch.models.segmentation import multi_scale_logits, sliding_logits
from cbsa_torch.train import (
    WindowOptions,
    evaluate_checkpoint,
    load_config,
    open_trained,
    predict_images,
    train,
)
from cbsa_torch.train.errors import ConfigError, DataError
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.tasks.segmentation.task import Segmentation
from tests.helpers import processes
from tests.helpers.colour_folder import tiny_config, write_colours
from tests.helpers.masked_folder import COUNTS, ENCODER, NAMES, write_masked_folder
from tests.helpers.runs import (
    STEPS,
    assert_refused,
    assert_same_run,
    assert_same_tensors,
    interrupt_training,
    last,
    measured,
    rows,
)


def test_a_run_measures_mean_iou_and_its_checkpoint_rebuilds_the_model(segmenter):
    found = rows(segmenter)
    assert [row["epoch"] for row in found] == [1, 2]
    model, info = load_checkpoint(RunFolder(segmenter.output).weights)
    best = max(row["val_miou"] for row in found)
    assert (info["model"], info["class_names"], info["val_miou"]) == ("segmenter", NAMES, best)
    assert model(torch.randn(1, 3, 30, 50)).shape == (1, 3, 30, 50)
    assert load_config(RunFolder(segmenter.output).config) == segmenter
    card = RunFolder(segmenter.output).card.read_text()
    assert "pipeline_tag: image-segmentation" in card
    assert "Mean IoU on validation" in card


def test_it_learns(config):
    config.optim.epochs, config.optim.lr = 25, 1e-2
    train(config)
    assert rows(config)[-1]["train_loss"] < 0.6 * rows(config)[0]["train_loss"]


def test_a_run_killed_within_an_epoch_goes_on_exactly(config, segmenter):
    config.engine.save_steps = 1
    interrupt_training(config, STEPS + 3)
    assert last(config)["progress"]["batch"] == 2
    torch.manual_seed(99)
    train(config)
    assert_same_run(config, segmenter)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_encoder_stays_as_it_was(config, frozen):
    config.model.args["freeze_encoder"] = frozen
    states = []
    for epochs in (1, 2):
        config.optim.epochs, config.accept_changes = epochs, epochs == 2
        train(config)
        states.append(last(config)["model"])
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert any(name.startswith("decoder.") for name in changed)
    assert any(name.startswith("encoder.") for name in changed) is not frozen


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """The folder of a trained classifier with the encoder of the segmenter."""
    folder = tmp_path_factory.mktemp("classifier")
    config = tiny_config(write_colours(folder / "images"), folder / "run")
    config.engine.tracker, config.optim.epochs = "none", 1
    config.model.args = dict(ENCODER)
    train(config)
    return config.output


def test_the_encoder_starts_from_a_classifier(config, classifier):
    config.model.encoder_from = classifier
    config.model.args = {"depth": 1, "num_heads": 2, "head_dim": 8}
    opened = Segmentation(config).open(Path("unused"), continued=False)
    source, info = load_checkpoint(RunFolder(classifier).weights)
    weights, encoder = source.state_dict(), opened.model.encoder.state_dict()
    assert encoder
    assert_same_tensors(encoder, {name: weights[name] for name in encoder})
    assert opened.model_args["encoder"] == info["model"]
    assert opened.model_args["encoder_args"] == ENCODER
    train(config)
    assert load_checkpoint(RunFolder(config.output).weights)[1]["model_args"] == opened.model_args


def test_another_encoder_than_that_of_its_weights_is_refused(config, classifier):
    config.model.encoder_from = classifier
    assert_refused(
        config, CheckpointError, r"model\.encoder_from: .* has its model's arguments, leave them out"
    )
    config.model.args = {"encoder": "vit_tiny_patch16_224"}
    assert_refused(config, CheckpointError, "holds 'cbt_nano_patch4_32', not the 'vit_tiny_patch16_224'")


def test_a_segmenter_is_no_encoder(config, segmenter):
    config.model.args, config.model.encoder_from = {}, segmenter.output
    assert_refused(config, ConfigError, r"must be a classifier, .* use model\.init_from")


def test_an_encoder_of_one_size_is_refused_before_the_folder_is_touched(config):
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    config.model.args = {"encoder": "beit_base_patch16_224", "encoder_args": sizes, "dim": 8, "num_heads": 1}
    assert_refused(config, ConfigError, r"data\.crop_size 32 does not fit the model: .* \(224, 224\)")
    config.data.crop_size, config.windows.native = 224, True
    assert_refused(config, ConfigError, r"windows\.native does not fit the model: .* \(224, 224\)")


def test_weights_of_another_shape_are_refused(config, classifier, monkeypatch):
    config.model.encoder_from, config.model.args = classifier, {}
    info = load_checkpoint(RunFolder(classifier).weights)[1]
    small = timm.create_model("cbt_nano_patch4_32", **{**ENCODER, "embed_dim": 8})
    opened = (small, info, Path(classifier))
    monkeypatch.setattr("cbsa_torch.train.tasks.segmentation.task.open_source", lambda key, source, *_: opened)
    with pytest.raises(CheckpointError, match=r"model\.encoder_from .* does not fit the model"):
        train(config)


def test_pretrained_weights_are_fetched_for_a_new_run_only(config, monkeypatch):
    asked = []

    def fetched(name, pretrained=False, **args):
        asked.append(pretrained)
        return create(name, **args)

    create = timm.create_model
    config.model.encoder_from = "pretrained"
    with monkeypatch.context() as patch:
        patch.setattr("cbsa_torch.train.tasks.segmentation.task.timm.create_model", fetched)
        Segmentation(config).open(Path("unused"), continued=False)
        assert asked.count(True) == 1
        Segmentation(config).open(Path("unused"), continued=True)
        assert asked.count(True) == 1


@pytest.mark.parametrize("sharded", [False, True], ids=["copies", "sharded"])
def test_two_processes_train_and_measure_like_one(config, segmenter, tmp_path, sharded):
    """Five validation images of different sizes, which two processes do not share out evenly."""
    config.engine.fsdp = sharded
    assert ("sharded" in processes.train(2, config).stdout) == sharded
    for first, second in zip(measured(config), measured(segmenter), strict=True):
        assert first["val_miou"] == pytest.approx(second["val_miou"], abs=2e-3)  # a pixel may tip over
        for key in ("train_loss", "val_loss"):
            assert first[key] == pytest.approx(second[key], rel=1e-5)
    several, one = tmp_path / "several.json", tmp_path / "one.json"
    arguments = ["--checkpoint", config.output, "--split", "val", "--output", str(several)]
    result = processes.run(2, "eval", *arguments)
    assert result.returncode == 0, result.stderr
    evaluate_checkpoint(config.output, split="val", output=one)
    first, second = (json.loads(path.read_text()) for path in (several, one))
    assert first == second
    assert first["images"] == 5


def test_bad_masks_are_listed_and_the_rest_is_trained_on(config):
    root = Path(config.data.root)
    (root / "train/masks/0.png").unlink()
    Image.new("RGB", (30, 30)).save(root / "train/masks/1.png")
    Image.new("L", (5, 5)).save(root / "val/masks/0.png")
    train(config)
    text = RunFolder(config.output).skipped.read_text()
    assert len(text.splitlines()) == 3
    assert "no mask for image" in text
    assert "5x5" in text


def test_a_single_class_is_refused(config):
    (Path(config.data.root) / "classes.txt").write_text("only")
    assert_refused(config, DataError, "has one class, .* needs a class of its own")


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("windows", "size", 0, r"windows\.size must be at least 1, got 0"),
        ("windows", "stride", 33, r"windows\.stride must be in \[1, 32\], the window, got 33"),
        ("windows", "batch", 0, r"windows\.batch must be at least 1, got 0"),
        ("data", "crop_size", 0, r"data\.crop_size must be at least 1, got 0"),
        ("data", "name", "ade", r"data\.name must be one of .*, got 'ade'"),
        ("model", "name", "cbt_tiny_patch16_224", r"model\.name must be 'segmenter'"),
        ("model", "encoder_from", "nowhere", r"model\.encoder_from: no weights file at nowhere"),
        ("optim", "poly_power", 0.0, r"optim\.poly_power must be positive, got 0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(config, section, key, value, message):
    setattr(getattr(config, section), key, value)
    assert_refused(config, (ConfigError, FileNotFoundError), message)


def test_weights_of_the_whole_and_of_the_encoder_exclude_each_other(config):
    config.model.init_from = config.model.encoder_from = "a"
    assert_refused(config, ConfigError, "exclude each other")


def test_a_run_starts_from_the_weights_of_another(config, segmenter):
    config.model.args, config.model.init_from = {}, segmenter.output
    opened = Segmentation(config).open(Path("unused"), continued=False)
    kept = load_checkpoint(RunFolder(segmenter.output).weights)[0].state_dict()
    assert_same_tensors(opened.model.state_dict(), kept)


# ---- evaluation and prediction, by the library and by the commands


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


def test_whole_images_are_packed_within_the_budget_and_are_what_they_are_alone(
    config, segmenter, tmp_path, monkeypatch, capsys
):
    root = Path(config.data.root) / "test"
    generator = np.random.default_rng(0)
    images = sorted((root / "images").iterdir())
    for i, path in enumerate(images):  # 128, 192, 256 and 320 patches, and three classes
        for folder, shape in (("images", (32, 64 + 32 * i, 3)), ("masks", (32, 64 + 32 * i))):
            drawn = generator.integers(0, 256 if folder == "images" else 3, shape, dtype=np.uint8)
            Image.fromarray(drawn).save(root / folder / path.name)
    config.windows.native, config.windows.max_tokens, config.windows.size = True, 400, 24
    assert_refused(config, ConfigError, "windows.size must be left out with windows.native, got 24")
    config.windows.size = None
    train(config)  # validated so, too
    seen = []
    forward = Segmenter.forward
    monkeypatch.setattr(Segmenter, "forward", lambda model, x: seen.append(len(x)) or forward(model, x))
    result = evaluate_checkpoint(config.output)
    assert seen == [2, 1, 1]
    counts, loss = confusion_by_hand(config, lambda model, image: model.eval()(image[None])[0].detach())
    assert result.scores.confusion == counts.tolist()
    assert result.loss == pytest.approx(loss, rel=1e-5)

    seen.clear()  # trained by windows, and told to see images whole
    command = ["predict", "--checkpoint", segmenter.output, "--native", "--max-tokens", "600", "--masks"]
    assert main([*command, str(tmp_path / "packed"), *map(str, images)]) == 0
    assert seen == [3, 1]
    for path in images:
        assert main([*command, str(tmp_path / "alone"), str(path)]) == 0
        ours, theirs = (
            np.asarray(Image.open(tmp_path / f"{way}/{path.stem}_labels.png")) for way in ("packed", "alone")
        )
        np.testing.assert_array_equal(ours, theirs)
    capsys.readouterr()
    for options, message in (
        (["--window", "24"], "window must be left out where images are seen whole, got 24"),
        (["--flip"], "flip must be left out where images are seen whole, got True"),
        (["--max-image-tokens", "9"], "max_image_tokens has no effect for the task 'segmentation'"),
    ):
        assert main([*command, str(tmp_path / "other"), *options, str(images[0])]) == 1
        assert message in capsys.readouterr().err
    assert main(["eval", "--checkpoint", config.output, "--batch-size", "2"]) == 1
    assert "batch_size is of windows" in capsys.readouterr().err


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
    arguments = ["--checkpoint", segmenter.output, "--masks", str(masks), "--output", str(record)]
    assert main(["predict", image, *arguments]) == 0
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
    with pytest.raises(ConfigError, match="top has no effect for the task 'segmentation'"):
        predict_images(segmenter.output, [image], masks=tmp_path / "other", top=3)


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
    options = {"masks": tmp_path / "masks", "on_bad_image": "skip"}
    (found,) = predict_images(segmenter.output, [tmp_path / "bad.png"], **options)
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
