"""A run goes on as if it had not been interrupted, killed wherever it was; or with what was changed."""

import copy
import dataclasses
import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch

from cbsa_torch.models import load_checkpoint
from cbsa_torch.models.checkpoint import CheckpointError
from cbsa_torch.train import load_config, train, trainer
from cbsa_torch.train.engine.accelerate import new_accelerator
from cbsa_torch.train.errors import InterruptedRun
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.run.state import read_state, write_state
from tests.helpers.colour_folder import tiny_config, write_colours
from tests.helpers.damage import flip_bit
from tests.helpers.killing import train_and_kill
from tests.helpers.runs import (
    STEPS,
    assert_refused,
    assert_same_run,
    assert_same_tensors,
    contents,
    during_training_step,
    elsewhere,
    interrupt_training,
    last,
    rows,
    states,
)


@pytest.mark.parametrize(
    ("name", "ema_decay", "keep", "workers"),
    [("adamw", None, "best", 0), ("lion", 0.9, "last", 0), ("adamw", None, "best", 1)],
)
def test_a_resumed_run_equals_an_uninterrupted_one(config, tmp_path, name, ema_decay, keep, workers):
    config.optim.name, config.optim.ema_decay, config.optim.epochs = name, ema_decay, 4
    config.optim.warmup_epochs, config.optim.keep, config.data.workers = 1, keep, workers
    train(config)
    cut = dataclasses.replace(config, output=str(tmp_path / "cut"))
    interrupt_training(cut, 2 * STEPS + 2)
    assert [row["epoch"] for row in rows(cut)] == [1, 2]
    torch.manual_seed(99)
    result = train(dataclasses.replace(cut, resume=True))
    assert result[1:] == (
        max(rows(config), key=lambda row: (row["val_top1"], -row["val_loss"]))["epoch"],
        result.best_score,
    )
    assert_same_run(cut, config)
    if ema_decay is not None:
        assert_same_tensors(last(cut)["ema"], last(config)["ema"])
    best = [load_checkpoint(RunFolder(c.output).weights)[0].state_dict() for c in (cut, config)]
    assert_same_tensors(*best)


@pytest.mark.parametrize("name", ["adamw", "lion"])  # fused: the scaler is within the step; or around it
def test_the_scale_of_mixed_precision_goes_on(config, tmp_path, monkeypatch, name):
    """Accelerate scales fp16 losses on GPUs only; here torch's scaler for CPUs is put in its place."""

    def with_scaler(**settings):
        accelerator = new_accelerator(**settings)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        return accelerator

    monkeypatch.setattr(trainer, "new_accelerator", with_scaler)
    config.optim.name, config.optim.clip_grad, config.engine.save_steps = name, 1.0, 1
    train(config)
    assert last(config)["scaler"]["scale"] == 8.0 * 2 ** (2 * STEPS // 2)
    cut = dataclasses.replace(config, output=str(tmp_path / "cut"))
    interrupt_training(cut, STEPS + 3)
    assert last(cut)["scaler"]["_growth_tracker"] == (STEPS + 2) % 2
    train(cut)
    assert last(cut)["scaler"] == last(config)["scaler"]
    assert_same_run(cut, config)


def test_ctrl_c_keeps_the_states_and_says_where_the_run_goes_on(config, monkeypatch, capsys):
    kept = {}

    def stop(loss, logits):
        kept.update(contents(Path(config.output)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        during_training_step(patch, STEPS + 2, stop)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert "interrupted; the last training state is that of epoch 1" in capsys.readouterr().out
    after = contents(Path(config.output))
    for name in ("states/step_0000000003.state", "model.safetensors", "metrics.jsonl", "config.yaml"):
        assert after[name] == kept[name]
    train(dataclasses.replace(config, resume=True))
    assert "continuing after epoch 1 of 2" in capsys.readouterr().out


def test_a_run_interrupted_in_its_first_epoch_starts_over(config, whole, capsys):
    interrupt_training(config, 2)
    assert "there is no training state yet" in capsys.readouterr().out
    train(dataclasses.replace(config, resume=True))
    assert_same_tensors(last(config)["model"], last(whole)["model"])


def test_resuming_repairs_metrics_cut_short_or_ahead_of_the_checkpoint(config):
    interrupt_training(config, STEPS + 1)
    metrics = RunFolder(config.output).metrics
    ahead = json.dumps({**rows(config)[0], "epoch": 2})
    metrics.write_text(metrics.read_text() + ahead + '\n{"epoch": 3, "st')
    train(dataclasses.replace(config, resume=True))
    assert [row["epoch"] for row in rows(config)] == [1, 2]


def test_metrics_of_a_first_epoch_without_checkpoint_are_forgotten(config, run):
    shutil.rmtree(run.state_folder)
    run.keep_metrics_until(1)  # as a run leaves it that was killed before its first state
    train(dataclasses.replace(config, resume=True))
    assert [row["epoch"] for row in rows(config)] == [1, 2]


@pytest.mark.parametrize("own", [False, True])
def test_resuming_a_finished_run_changes_no_file_that_counts(config, run, own):
    """By the configuration that it was started with, or by the one in its folder."""
    if own:
        config.overwrite = True
        train(config)
        config = load_config(run.config)
        assert not config.overwrite
    before = contents(run.path)
    best = max(rows(config), key=lambda row: (row["val_top1"], -row["val_loss"]))
    assert train(dataclasses.replace(config, resume=True)) == (run.path, best["epoch"], best["val_top1"])
    after = contents(run.path)
    for name in ("states/step_0000000006.state", "model.safetensors", "metrics.jsonl"):
        assert after[name] == before[name]


def test_what_changes_no_number_may_change_without_asking(config, whole):
    interrupt_training(config, STEPS + 1)
    # "--data.download the first time", say the recipes
    config.data.workers, config.data.download, config.engine.keep_states = 1, True, 1
    train(config)
    assert_same_run(config, whole)


def test_a_moved_run_resumes(config, run, tmp_path, capsys):
    shutil.move(run.path, tmp_path / "moved")
    config.output, config.optim.epochs = str(tmp_path / "moved"), 3
    train(dataclasses.replace(config, resume=True, accept_changes=True))
    assert "continuing after epoch 2 of 3" in capsys.readouterr().out
    assert [row["epoch"] for row in rows(config)] == [1, 2, 3]


def test_a_broken_newest_state_is_named_and_the_one_before_taken(config, run, whole, capsys):
    path = states(config)[0]
    flip_bit(path, 0.5)
    train(config)
    said = capsys.readouterr().out
    assert f"left aside: {path}" in said
    assert "continuing after epoch 1 of 2" in said
    assert_same_run(config, whole)


def test_broken_states_left_aside_do_not_push_out_new_ones(config):
    config.optim.epochs, config.engine.keep_states = 4, 3
    train(config)
    for path in states(config)[:2]:
        path.write_bytes(b"torn")
    config.engine.keep_states, config.engine.save_steps = 2, 1
    interrupt_training(config, 3)
    assert [path.name[-8:-6] for path in states(config)] == ["12", "09", "08", "07"]
    train(config)
    assert [row["epoch"] for row in rows(config)] == [1, 2, 3, 4]


def test_without_a_whole_state_a_run_is_refused_and_left_as_it_is(config, run):
    path, older = states(config)
    older.unlink()
    path.write_bytes(b"")
    message = f"no training state can be used: {path}"
    assert_refused(config, CheckpointError, message, folder=run.state_folder)


def test_an_optimiser_state_of_another_shape_is_refused(config, run):
    path = states(config)[0]
    state = read_state(path)
    for values in state["optimizer"]["state"].values():
        values["exp_avg"] = torch.zeros(3)
    write_state(path, state)
    config.optim.epochs, config.accept_changes = 3, True
    with pytest.raises(CheckpointError, match=r"the optimiser's exp_avg of cls_token has shape \(3,\)"):
        train(config)


def test_the_state_of_another_model_is_refused(config, run):
    config.model.args["depth"], config.accept_changes = 2, True
    run.describe(config)
    with pytest.raises(
        CheckpointError, match=r"step_0000000006\.state does not fit the model: missing blocks\.1"
    ):
        train(config)


# ---- with another configuration: it takes effect, or is refused before anything is lost


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Four epochs with a cosine, stopped after the second step of the second; not to be changed."""
    folder = tmp_path_factory.mktemp("stopped")
    config = tiny_config(write_colours(folder / "images"), folder / "run")
    config.optim.epochs = 4
    with pytest.MonkeyPatch.context() as patch:
        during_training_step(
            patch, STEPS + 2, lambda loss, logits: (signal.raise_signal(signal.SIGTERM), loss)[1]
        )
        with pytest.raises(InterruptedRun):
            train(config)
    return config


@pytest.fixture
def changed(stopped, tmp_path):
    """A copy of that run, of which changes are accepted."""
    other = elsewhere(stopped, tmp_path / "changed")
    shutil.copytree(stopped.output, other.output)
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
        (lambda c: c.model.args.update(depth=2), "does not fit the model"),
        (lambda c: setattr(c.optim, "ema_decay", 0.9), "no average of the weights"),
        (lambda c: setattr(c.optim, "name", "lion"), "another optimiser"),
    ],
    ids=["model", "average", "optimiser"],
)
def test_what_does_not_fit_is_refused_and_the_run_stays_as_it_was(changed, change, message):
    before = copy.deepcopy(changed)
    change(changed)
    with pytest.raises(CheckpointError, match=message):
        train(changed)
    own = load_config(RunFolder(changed.output).config)
    assert (own.model.args, own.optim) == (before.model.args, before.optim)
    before.accept_changes = False
    train(before)
    assert len(rows(before)) == 4


# ---- kill -9 at every moment


PARTS = 6
"""The moments are divided among so many tests."""


@pytest.fixture
def killed_config(config):
    """Six steps with averaging and dropped paths, a state after every second, on augmented images."""
    config.engine.save_steps = 2
    config.optim.ema_decay = 0.9
    config.model.name, config.model.args = "vit_tiny_patch16_224", {
        "embed_dim": 12, "depth": 2, "num_heads": 2, "patch_size": 8, "drop_path_rate": 0.3,
    }  # fmt: skip
    config.model.image_size = 32
    return config


def everything(config):
    """What must not depend on interruptions."""
    state = last(config)
    weights, info = load_checkpoint(RunFolder(config.output).weights)
    return state, weights.state_dict(), info


def assert_same_everything(first, second):
    assert_same_run(first, second)
    (one, weights, info), (other, others_weights, others_info) = everything(first), everything(second)
    assert_same_tensors(one["ema"], other["ema"])
    for name, state in one["optimizer"]["state"].items():
        assert_same_tensors(state, other["optimizer"]["state"][name])
    assert_same_tensors(weights, others_weights)
    timed = ("seconds", "waited")
    assert {k: v for k, v in one["progress"].items() if k not in timed} == {
        k: v for k, v in other["progress"].items() if k not in timed
    }
    assert (info["epoch"], info["val_top1"]) == (others_info["epoch"], others_info["val_top1"])


@pytest.mark.parametrize("part", [0, 1, *(pytest.param(i, marks=pytest.mark.slow) for i in range(2, PARTS))])
def test_killed_anywhere_a_run_goes_on_exactly(killed_config, tmp_path, part):
    whole = elsewhere(killed_config, tmp_path / "whole")
    moments = train_and_kill(whole)
    assert moments is not None
    assert moments >= 40  # so many kill points there are
    for number in range(1 + part, moments + 1, PARTS):
        cut = elsewhere(killed_config, tmp_path / f"cut{number}")
        assert train_and_kill(cut, number) is None
        train(cut)
        assert_same_everything(cut, whole)
        assert not list(RunFolder(cut.output).path.rglob("*.tmp"))
