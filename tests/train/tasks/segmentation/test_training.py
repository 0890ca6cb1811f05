"""Segmenters train through the engine of all runs: windows in validation, exact resume, frozen encoders."""

import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.scheduler import PolyLRScheduler

from cbsa_torch.models import load_checkpoint
from cbsa_torch.models.checkpoint import CheckpointError
from cbsa_torch.train import load_config, train
from cbsa_torch.train.config import check_config, dump_yaml
from cbsa_torch.train.engine.optim import make_scheduler
from cbsa_torch.train.errors import ConfigError, DataError
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.tasks.segmentation import SegmentationTrainConfig
from cbsa_torch.train.tasks.segmentation.task import Segmentation
from tests.helpers.masked_folder import ENCODER, NAMES, tiny_segmentation, write_masked_folder
from tests.helpers.runs import assert_same_tensors, during_training_step, interrupt, last, measured, rows
from tests.train.conftest import tiny_config
from tests.train.test_distributed import launch, launch_training

STEPS = 3
"""Steps of an epoch."""


@pytest.fixture
def config(tmp_path):
    return tiny_segmentation(write_masked_folder(tmp_path / "scenes"), tmp_path / "run")


def test_a_run_measures_mean_iou_and_its_checkpoint_rebuilds_the_model(config):
    result = train(config)
    assert [row["epoch"] for row in rows(config)] == [1, 2]
    assert result.best_score == max(row["val_miou"] for row in rows(config))
    model, info = load_checkpoint(RunFolder(config.output).weights)
    assert (info["model"], info["class_names"], info["val_miou"]) == ("segmenter", NAMES, result.best_score)
    assert model(torch.randn(1, 3, 30, 50)).shape == (1, 3, 30, 50)
    assert load_config(RunFolder(config.output).config) == config
    card = RunFolder(config.output).card.read_text()
    assert "pipeline_tag: image-segmentation" in card
    assert "Mean IoU on validation" in card


def test_it_learns(config):
    config.optim.epochs, config.optim.lr = 25, 1e-2
    train(config)
    assert rows(config)[-1]["train_loss"] < 0.6 * rows(config)[0]["train_loss"]


def test_a_run_killed_within_an_epoch_goes_on_exactly(config, tmp_path, monkeypatch):
    config.engine.save_steps = 1
    train(config)
    cut = dataclasses.replace(config, output=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        during_training_step(patch, STEPS + 3, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    assert last(cut)["progress"]["batch"] == 2
    torch.manual_seed(99)
    train(cut)
    assert measured(cut) == measured(config)
    assert_same_tensors(last(cut)["model"], last(config)["model"])


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_encoder_stays_as_it_was(config, frozen):
    config.model.args["freeze_encoder"] = frozen
    before = Segmentation(config).open(Path("unused"), continued=False).model
    torch.manual_seed(config.seed)
    train(config)
    states = [last(dataclasses.replace(config))["model"]]
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, epochs=3), accept_changes=True)
    train(config)
    states.append(last(config)["model"])
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert states[0].keys() == before.state_dict().keys()
    assert any(name.startswith("decoder.") for name in changed)
    assert any(name.startswith("encoder.") for name in changed) is not frozen


@pytest.fixture
def classifier(images, tmp_path):
    """The folder of a trained classifier with the encoder of the segmenter."""
    config = tiny_config(images, tmp_path / "classifier")
    config.engine.tracker = "none"
    config.model.args = {key: str(value) for key, value in ENCODER.items()}
    train(config)
    return config.output


def test_the_encoder_starts_from_a_classifier(config, classifier):
    config.model.encoder_from = classifier
    config.model.args = {"depth": "1", "num_heads": "2", "head_dim": "8"}
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
    with pytest.raises(ConfigError, match=r"model\.args encoder_args must be left out"):
        train(config)
    config.model.args = {"encoder": "vit_tiny_patch16_224"}
    with pytest.raises(
        ConfigError, match=r"model\.args encoder must be left out .* holds 'cbt_nano_patch4_32'"
    ):
        train(config)
    assert not Path(config.output).exists()


def test_a_segmenter_is_no_encoder(config, tmp_path):
    train(config)
    further = tiny_segmentation(Path(config.data.root), tmp_path / "further")
    further.model.args, further.model.encoder_from = {}, config.output
    with pytest.raises(ConfigError, match=r"must be a classifier, .* use model\.init_from"):
        train(further)


def test_an_encoder_of_one_size_is_refused_before_the_folder_is_touched(config):
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    config.model.args = {"encoder": "beit_base_patch16_224", "encoder_args": sizes, "dim": 8, "num_heads": 1}
    with pytest.raises(ConfigError, match=r"data\.crop_size 32 does not fit the model: .* \(224, 224\)"):
        train(config)
    assert not Path(config.output).exists()


def test_weights_of_another_shape_are_refused(config, classifier, monkeypatch):
    config.model.encoder_from, config.model.args = classifier, {}
    small = timm.create_model("cbt_nano_patch4_32", **{**ENCODER, "embed_dim": 8}).state_dict()
    monkeypatch.setattr("cbsa_torch.train.tasks.segmentation.task.encoder_weights", lambda config: small)
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


def test_two_processes_train_and_measure_like_one(config, tmp_path):
    """Five validation images of different sizes, which two processes do not share out evenly."""
    alone = dataclasses.replace(config, output=str(tmp_path / "alone"))
    train(alone)
    launch_training(2, config)
    for first, second in zip(measured(config), measured(alone), strict=True):
        assert first["val_miou"] == pytest.approx(second["val_miou"], abs=2e-3)  # a pixel may tip over
        for key in ("train_loss", "val_loss"):
            assert first[key] == pytest.approx(second[key], rel=1e-5)
    several, one = tmp_path / "several.json", tmp_path / "one.json"
    for count, output in ((2, several), (1, one)):
        result = launch(count, "eval", "--checkpoint", config.output, "--split", "val", "--output", str(output))
        assert result.returncode == 0, result.stderr
    first, second = (json.loads(path.read_text()) for path in (several, one))
    assert first == second
    assert first["images"] == 5


def test_sharded_training_equals_one_process(config, tmp_path):
    alone = dataclasses.replace(config, output=str(tmp_path / "alone"))
    train(alone)
    config.engine.fsdp = True
    launch_training(2, config)
    for first, second in zip(measured(config), measured(alone), strict=True):
        assert first["val_miou"] == pytest.approx(second["val_miou"], abs=2e-3)
        assert first["train_loss"] == pytest.approx(second["train_loss"], rel=1e-5)


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


def test_one_bad_mask_more_than_the_limit_stops(config):
    config.data.max_bad_images = 0
    Image.new("L", (5, 5)).save(Path(config.data.root) / "train/masks/0.png")
    with pytest.raises(DataError, match=r"data\.max_bad_images is 0"):
        train(config)


def test_a_single_class_is_refused(config):
    (Path(config.data.root) / "classes.txt").write_text("only")
    with pytest.raises(DataError, match="has one class, .* needs a class of its own"):
        train(config)


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
    with pytest.raises((ConfigError, FileNotFoundError), match=message):
        train(config)
    assert not Path(config.output).exists()


def test_weights_of_the_whole_and_of_the_encoder_exclude_each_other(config):
    config.model.init_from = config.model.encoder_from = "a"
    with pytest.raises(ConfigError, match="exclude each other"):
        train(config)


def test_a_run_goes_on_from_the_weights_of_another(config, tmp_path):
    train(config)
    further = tiny_segmentation(Path(config.data.root), tmp_path / "further")
    further.model.args, further.model.init_from = {}, config.output
    opened = Segmentation(further).open(Path("unused"), continued=False)
    kept = load_checkpoint(RunFolder(config.output).weights)[0].state_dict()
    assert_same_tensors(opened.model.state_dict(), kept)


def test_recipes_are_of_the_task_they_name(tmp_path):
    config = load_config("segmenter_ade20k")
    assert isinstance(config, SegmentationTrainConfig)
    check_config(config)
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    assert load_config(path) == config
    path.write_text("task: segmentatoin")
    with pytest.raises(
        ConfigError, match="task must be one of 'classification', 'segmentation', .*did you mean"
    ):
        load_config(path)


def test_the_learning_rate_falls_as_a_power(config):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=config.optim.lr)
    scheduler = make_scheduler(optimizer, config.optim, 10)
    assert isinstance(scheduler, PolyLRScheduler)
    for step in (0, 7, 19):
        scheduler.step_update(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(config.optim.lr * (1 - step / 20) ** 0.9)
