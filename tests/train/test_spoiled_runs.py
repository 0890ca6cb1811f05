"""What spoils a run without a word is refused: gradients that are not numbers, data of which nothing can be read."""

import dataclasses
from pathlib import Path

import pytest

from cbsa_torch.train import train
from cbsa_torch.train.errors import ConfigError, DataError, NonFiniteLossError
from tests.helpers.runs import STEPS, assert_same_tensors, during_training_step, last, measured, rows, states


def spoil_the_gradient(loss, logits):
    return loss + (logits * 0).sum().abs().sqrt()  # adds zero, with gradient nan


@pytest.mark.parametrize("clip_grad", [None, 1.0])
def test_weights_spoiled_by_a_gradient_are_not_kept(config, monkeypatch, tmp_path, clip_grad):
    config.engine.save_steps, config.engine.keep_states = 1, 1
    config.optim.clip_grad = clip_grad
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"))
    train(whole)
    with monkeypatch.context() as patch:
        during_training_step(patch, STEPS + 2, spoil_the_gradient)
        expected = r"by step 5 \(.*\): the loss was finite, its gradient was not; .* epoch 1 and 1 batches"
        with pytest.raises(NonFiniteLossError, match=expected):
            train(config)
    assert [path.name for path in states(config)] == [f"step_{STEPS + 1:010d}.state"]
    assert all(value.isfinite().all() for value in last(config)["model"].values())
    train(config)
    assert measured(config) == measured(whole)
    assert_same_tensors(last(config)["model"], last(whole)["model"])


def test_weights_spoiled_by_the_last_step_are_not_evaluated(config, monkeypatch):
    config.optim.epochs = 1
    during_training_step(monkeypatch, STEPS, spoil_the_gradient)
    with pytest.raises(NonFiniteLossError, match=f"by step {STEPS} .* there is no training state yet"):
        train(config)
    assert rows(config) == []


@pytest.mark.parametrize(
    ("split", "said"), [("train", "no training image of epoch 1"), ("val", "validation split")]
)
def test_data_of_which_nothing_can_be_read_stop_the_run(config, images: Path, split, said):
    config.data.max_bad_images = 1000
    for path in (images / split).rglob("*.png"):
        path.write_bytes(b"torn")
    with pytest.raises(DataError, match=rf"{said} could be read; they are listed in .*skipped_images\.txt"):
        train(config)
    assert rows(config) == []
    assert not states(config)


def test_fp16_is_refused_on_the_cpu(config):
    """Accelerate would compute in float32 and say nothing."""
    config.engine.precision = "fp16"
    with pytest.raises(ConfigError, match=r"engine\.precision fp16 needs a GPU"):
        train(config)
    assert not Path(config.output).exists()
