"""A step in parts is the step in one: of any number of parts, with unreadable images, stopped within an epoch."""

import copy
import dataclasses

import pytest
import torch

from cbsa_torch.train import train
from cbsa_torch.train.config import ModelConfig
from tests.helpers.runs import (
    STEPS,
    assert_same_tensors,
    during_training_step,
    interrupt,
    last,
    measured,
    rows,
    states,
)


@pytest.fixture
def config(config):
    """No batch norm, no random crops: a batch and its parts see the same images and compute the same."""
    arguments = {"embed_dim": "16", "depth": "1", "num_heads": "2", "patch_size": "16"}
    config.model = ModelConfig("vit_tiny_patch16_224", image_size=32, args=arguments)
    config.data.crop_scale, config.data.crop_ratio, config.data.hflip = (1.0, 1.0), (1.0, 1.0), 0.0
    config.optim.name, config.optim.lr, config.optim.epochs = "sgd", 0.1, 1
    return config


def in_parts(config, tmp_path, batch_size, accumulate):
    other = copy.deepcopy(config)
    other.output, other.optim.batch_size = str(tmp_path / f"parts_{accumulate}"), batch_size
    other.engine.accumulate = accumulate
    return other


def assert_same_run(one, other):
    assert [row["step"] for row in rows(one)] == [row["step"] for row in rows(other)]
    for first, second in zip(rows(one), rows(other), strict=True):
        assert first["train_loss"] == pytest.approx(second["train_loss"], rel=1e-4)
    torch.testing.assert_close(last(one)["model"], last(other)["model"], atol=1e-6, rtol=1e-5)


def test_a_last_step_of_fewer_parts_is_a_step_of_a_smaller_batch(config, images, tmp_path):
    for folder in (images / "train").iterdir():
        for path in sorted(folder.iterdir())[4:]:
            path.unlink()  # 12 images are left: one part of two, or a whole batch of 12
    split = in_parts(config, tmp_path, 24, 2)
    config.optim.batch_size = 12
    train(config)
    train(split)
    assert rows(config)[0]["step"] == 1
    assert_same_run(config, split)


@pytest.mark.parametrize("clip_grad", [None, 0.01])
def test_every_image_weighs_the_same_when_some_cannot_be_read(config, images, tmp_path, clip_grad):
    config.optim.clip_grad = clip_grad
    for path in (images / "train" / "red").iterdir():
        path.write_bytes(b"torn")
    split = in_parts(config, tmp_path, 8, 4)
    train(config)
    train(split)
    assert_same_run(config, split)


def test_a_run_stopped_within_an_epoch_of_accumulated_steps_goes_on_exactly(config, tmp_path, monkeypatch):
    config.optim.name, config.optim.epochs, config.engine.accumulate = "adamw", 2, 4
    config.model.args["drop_path_rate"] = "0.2"
    config.engine.save_steps = 1
    train(config)
    cut = dataclasses.replace(config, output=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        # in epoch 2, the second step: between its parts
        during_training_step(patch, 4 * STEPS + 4 + 2, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    assert last(cut)["progress"]["batch"] == 4
    assert states(cut)[0].name == f"step_{STEPS + 1:010d}.state"
    train(cut)
    assert measured(cut) == measured(config)
    assert_same_tensors(last(cut)["model"], last(config)["model"])
