"""kill -9 at every moment of a run: going on gives the same weights and metrics as not having been killed."""

import dataclasses

import pytest

from cbsa_torch.models import load_checkpoint
from cbsa_torch.train import train
from cbsa_torch.train.run.folder import RunFolder
from tests.helpers.killing import train_and_kill
from tests.helpers.runs import assert_same_tensors, last, measured

PARTS = 6
"""The moments are divided among so many tests."""


@pytest.fixture
def killed_config(config):
    """Six steps with averaging and dropped paths, a state after every second, on augmented images."""
    config.engine.save_steps = 2
    config.optim.ema_decay = 0.9
    config.model.name, config.model.args = "vit_tiny_patch16_224", {
        "embed_dim": "12", "depth": "2", "num_heads": "2", "patch_size": "8", "drop_path_rate": "0.3",
    }  # fmt: skip
    config.model.image_size = 32
    return config


def everything(config):
    """What must not depend on interruptions."""
    state = last(config)
    weights, info = load_checkpoint(RunFolder(config.output).weights)
    return state, weights.state_dict(), info


def assert_same_run(first, second):
    (one, weights, info), (other, others_weights, others_info) = everything(first), everything(second)
    assert_same_tensors(one["model"], other["model"])
    assert_same_tensors(one["ema"], other["ema"])
    for name, state in one["optimizer"]["state"].items():
        assert_same_tensors(state, other["optimizer"]["state"][name])
    assert_same_tensors(weights, others_weights)
    timed = ("seconds", "waited")
    assert {k: v for k, v in one["progress"].items() if k not in timed} == {
        k: v for k, v in other["progress"].items() if k not in timed
    }
    assert (info["epoch"], info["val_top1"]) == (others_info["epoch"], others_info["val_top1"])
    assert measured(first) == measured(second)


@pytest.mark.parametrize("part", range(PARTS))
def test_killed_anywhere_a_run_goes_on_exactly(killed_config, tmp_path, part):
    whole = dataclasses.replace(killed_config, output=str(tmp_path / "whole"))
    moments = train_and_kill(whole)
    assert moments is not None
    assert moments >= 40  # so many kill points there are
    for number in range(1 + part, moments + 1, PARTS):
        cut = dataclasses.replace(killed_config, output=str(tmp_path / f"cut{number}"))
        assert train_and_kill(cut, number) is None
        train(cut)
        assert_same_run(cut, whole)
        assert not list(RunFolder(cut.output).path.rglob("*.tmp"))
