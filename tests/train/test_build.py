"""Models of a run: known before their classes, built once, and from the weights of another."""

import dataclasses
import shutil

import pytest
import torch

from cbsa_torch.models.checkpoint import CheckpointError, load_checkpoint
from cbsa_torch.train import build, evaluate_checkpoint, predict_images, train
from cbsa_torch.train.config import ModelConfig
from cbsa_torch.train.data import input_spec
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.run.folder import RunFolder
from tests.helpers.colour_folder import write_split
from tests.helpers.runs import assert_refused


@pytest.mark.parametrize(
    ("name", "mode"), [("cbt_pico_patch1_8", "L"), ("cbt_tiny_patch16_224", "RGB"), ("resnet18", "RGB")]
)
def test_a_draft_tells_the_input_and_draws_nothing(config, name, mode):
    config.model = ModelConfig(name=name)
    before = torch.get_rng_state()
    model = build.draft_model(config).model
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert input_spec(model).mode == mode


@pytest.mark.parametrize("fine_tuned", [False, True])
def test_a_run_builds_and_reads_its_model_once(config, whole, monkeypatch, fine_tuned):
    if fine_tuned:
        config.model = ModelConfig(name=config.model.name, init_from=whole.output)
    counts = {"built": 0, "read": 0}
    create, open_weights = build.timm.create_model, build.open_weights

    def built(*args, **kwargs):
        model = create(*args, **kwargs)
        counts["built"] += next(model.parameters()).device.type != "meta"
        return model

    def read(*args):
        counts["read"] += 1
        return open_weights(*args)

    monkeypatch.setattr(build.timm, "create_model", built)
    monkeypatch.setattr(build, "open_weights", read)
    train(config)
    assert counts == {"built": 1, "read": 1 if fine_tuned else 0}


@pytest.mark.parametrize("key", ["pretrained", "checkpoint_path", "pretrained_cfg"])
def test_arguments_with_which_no_checkpoint_opens_are_refused_before_training(config, key):
    config.model.args[key] = "true"
    assert_refused(config, ConfigError, f"model.args must not hold {key}")


# ---- fine-tuning


@pytest.mark.parametrize("source", ["folder", "file"])
def test_fine_tuning_with_other_classes_and_size(finished, config, images, source):
    for split in ("train", "val", "test"):
        shutil.rmtree(images / split)
        write_split(images / split, 8, ("blue", "red"))
    start = finished[1].folder
    config.model = ModelConfig(
        "cbt_nano_patch4_32",
        image_size=24,
        init_from=str(start if source == "folder" else RunFolder(start).weights),
    )
    train(config)
    model, info = load_checkpoint(RunFolder(config.output).weights)
    assert (model.num_classes, info["input"]["input_size"]) == (2, [3, 24, 24])
    assert model.pos_embed.shape[1] == 1 + 6 * 6
    assert evaluate_checkpoint(config.output).images == 16
    (prediction,) = predict_images(config.output, [images / "test" / "red" / "red_0.png"])
    assert sorted(prediction.classes) == ["blue", "red"]
    best = train(dataclasses.replace(config, resume=True))
    assert best.folder == RunFolder(config.output).path


def test_fine_tuning_starts_from_the_given_weights(finished, config):
    config.model = ModelConfig("cbt_nano_patch4_32", init_from=str(finished[1].folder))
    config.optim.lr, config.optim.epochs = 1e-6, 1
    assert train(config).best_score == finished[1].best_score


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        (
            "cbt_nano_patch4_64",
            {},
            r"model\.init_from: .* holds 'cbt_nano_patch4_32', not the 'cbt_nano_patch4_64'",
        ),
        ("cbt_nano_patch4_32", {"depth": 1}, "has its model's arguments, leave them out; got {'depth': 1}"),
    ],
)
def test_fine_tuning_another_model_is_refused(finished, config, name, args, message):
    config.model = ModelConfig(name, args=args, init_from=str(finished[1].folder))
    assert_refused(config, CheckpointError, message)
