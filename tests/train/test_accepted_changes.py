"""A run goes on with another configuration: what was changed takes effect, or is refused before anything is lost."""

import copy
import math
import os
import signal

import pytest

from cbsa_torch.models.checkpoint import CheckpointError
from cbsa_torch.train import load_config, train, trainer
from cbsa_torch.train.errors import InterruptedRun
from cbsa_torch.train.run.folder import RunFolder
from tests.helpers.runs import STEPS, during_training_step, rows


@pytest.fixture
def stopped(config, monkeypatch):
    """Four epochs with a cosine, stopped after the second step of the second."""
    config.optim.epochs = 4

    def stop(loss, logits):
        os.kill(os.getpid(), signal.SIGTERM)
        return loss

    with monkeypatch.context() as patch:
        during_training_step(patch, STEPS + 2, stop)
        with pytest.raises(InterruptedRun):
            train(config)
    return config


@pytest.fixture
def changed(stopped):
    other = copy.deepcopy(stopped)
    other.accept_changes = True
    return other


def test_another_weight_decay_is_used(changed, monkeypatch):
    changed.optim.weight_decay = 0.25
    used, run_epoch = [], trainer._run_epoch

    def patched(session, progress):
        run_epoch(session, progress)
        used.append({group["weight_decay"] for group in session.optimizer.param_groups})

    monkeypatch.setattr(trainer, "_run_epoch", patched)
    train(changed)
    assert used == [{0.0, 0.25}] * 3


@pytest.mark.parametrize("batch_size", [4, 24])
def test_another_batch_size_keeps_the_schedule_in_its_epoch(changed, batch_size):
    changed.optim.batch_size = batch_size
    train(changed)
    steps = 24 // batch_size
    for row in rows(changed)[1:]:
        share = (row["epoch"] * steps - 1) / (4 * steps)  # of the schedule, before the epoch's last step
        assert row["lr"] == pytest.approx(changed.optim.lr * (1 + math.cos(math.pi * share)) / 2)


def test_other_accumulation_goes_on_at_the_same_image(changed):
    changed.engine.accumulate = 4
    train(changed)
    assert [row["step"] for row in rows(changed)] == [STEPS * epoch for epoch in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.model.args.update(depth="2"), "does not fit the model"),
        (lambda c: setattr(c.optim, "ema_decay", 0.9), "no average of the weights"),
        (lambda c: setattr(c.optim, "name", "lion"), "another optimiser"),
    ],
    ids=["model", "average", "optimiser"],
)
def test_what_does_not_fit_is_refused_and_the_run_stays_as_it_was(stopped, changed, change, message):
    change(changed)
    with pytest.raises(CheckpointError, match=message):
        train(changed)
    own = load_config(RunFolder(stopped.output).config)
    assert own.model.args == stopped.model.args
    assert own.optim == stopped.optim
    train(stopped)
    assert len(rows(stopped)) == 4
