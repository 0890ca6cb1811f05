"""A run that was interrupted goes on as if it had not been."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from cbsa_torch.models import load_checkpoint
from cbsa_torch.models.checkpoint import CheckpointError
from cbsa_torch.train import load_config, train, trainer
from cbsa_torch.train.engine.accelerate import new_accelerator
from cbsa_torch.train.errors import RunFolderError
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.run.state import load_state, save_state
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


@pytest.mark.parametrize(
    ("name", "ema_decay", "keep", "workers"),
    [("adamw", None, "best", 0), ("lion", 0.9, "last", 0), ("adamw", None, "best", 1)],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    config, tmp_path, monkeypatch, name, ema_decay, keep, workers
):
    config.optim.name, config.optim.ema_decay, config.optim.epochs = name, ema_decay, 4
    config.optim.warmup_epochs, config.optim.keep, config.data.workers = 1, keep, workers
    train(config)
    cut = dataclasses.replace(config, output=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        during_training_step(patch, 2 * STEPS + 2, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    assert [row["epoch"] for row in rows(cut)] == [1, 2]
    torch.manual_seed(99)
    result = train(dataclasses.replace(cut, resume=True))
    assert result[1:] == (max(rows(config), key=lambda row: row["val_top1"])["epoch"], result.best_score)
    assert measured(cut) == measured(config)
    assert_same_tensors(last(cut)["model"], last(config)["model"])
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
    with monkeypatch.context() as patch:
        during_training_step(patch, STEPS + 3, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    assert last(cut)["scaler"]["_growth_tracker"] == (STEPS + 2) % 2
    train(cut)
    assert last(cut)["scaler"] == last(config)["scaler"]
    assert measured(cut) == measured(config)
    assert_same_tensors(last(cut)["model"], last(config)["model"])


def test_a_resumed_run_says_where_it_goes_on(config, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        during_training_step(patch, STEPS + 1, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert "interrupted; the last training state is that of epoch 1" in capsys.readouterr().out
    train(dataclasses.replace(config, resume=True))
    assert "continuing after epoch 1 of 2" in capsys.readouterr().out


def test_ctrl_c_keeps_the_states(config, monkeypatch, contents):
    kept = {}

    def stop(loss, logits):
        kept.update(contents(Path(config.output)))
        raise KeyboardInterrupt

    during_training_step(monkeypatch, STEPS + 2, stop)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    after = contents(Path(config.output))
    for name in ("states/step_0000000003.state", "model.safetensors", "metrics.jsonl", "config.yaml"):
        assert after[name] == kept[name]


def test_a_run_interrupted_in_its_first_epoch_starts_over(config, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        during_training_step(patch, 2, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert "there is no training state yet" in capsys.readouterr().out
    train(dataclasses.replace(config, resume=True))
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"))
    train(whole)
    assert_same_tensors(last(config)["model"], last(whole)["model"])


def test_resuming_repairs_metrics_cut_short_or_ahead_of_the_checkpoint(config, monkeypatch):
    with monkeypatch.context() as patch:
        during_training_step(patch, STEPS + 1, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    metrics = RunFolder(config.output).metrics
    ahead = json.dumps({**rows(config)[0], "epoch": 2})
    metrics.write_text(metrics.read_text() + ahead + '\n{"epoch": 3, "st')
    train(dataclasses.replace(config, resume=True))
    assert [row["epoch"] for row in rows(config)] == [1, 2]


def test_metrics_of_a_first_epoch_without_checkpoint_are_forgotten(config):
    train(config)
    folder = RunFolder(config.output)
    shutil.rmtree(folder.state_folder)
    folder.keep_metrics_until(1)  # as a run leaves it that was killed before its first state
    train(dataclasses.replace(config, resume=True))
    assert [row["epoch"] for row in rows(config)] == [1, 2]


def test_resuming_a_finished_run_changes_no_checkpoint(config, contents):
    result = train(config)
    before = contents(Path(config.output))
    assert train(dataclasses.replace(config, resume=True)) == result
    after = contents(Path(config.output))
    assert all(
        after[name] == before[name]
        for name in ("states/step_0000000006.state", "model.safetensors", "metrics.jsonl")
    )


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_resumed_run_is_configured_by_its_own_folder(config, overwrite):
    config.overwrite = overwrite
    train(config)
    own = load_config(RunFolder(config.output).config)
    own.resume = True
    train(own)


def test_resuming_with_another_configuration_names_what_changed(config, contents):
    train(config)
    before = contents(Path(config.output))
    changed = copy.deepcopy(config)
    changed.resume, changed.optim.lr, changed.model.args["depth"] = True, 1.0, "2"
    with pytest.raises(RunFolderError, match=r"model\.args\.depth: 1 -> 2\n  optim\.lr: 0\.003 -> 1\.0"):
        train(changed)
    assert contents(Path(config.output)) == before


def test_what_changes_no_number_may_change_without_asking(config):
    train(config)
    other = copy.deepcopy(config)
    # "--data.download the first time", say the recipes
    other.data.workers, other.data.download, other.engine.keep_states = 1, True, 1
    train(other)


def test_a_moved_run_resumes(config, tmp_path):
    train(config)
    shutil.move(config.output, tmp_path / "moved")
    train(dataclasses.replace(config, output=str(tmp_path / "moved"), resume=True))


def break_newest(config, content):
    path = states(config)[0]
    path.write_bytes(content(path.read_bytes()))
    return path


BREAKS = {
    "empty": lambda data: b"",
    "text": lambda data: b"plain text",
    "pickle": lambda data: b"PK\x03\x04 torn",
    "truncated": lambda data: data[:-500],
    "one bit": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    ),
}


@pytest.mark.parametrize("content", BREAKS.values(), ids=BREAKS)
def test_a_broken_newest_state_is_named_and_the_one_before_taken(config, tmp_path, capsys, content):
    train(config)
    path = break_newest(config, content)
    train(config)
    said = capsys.readouterr().out
    assert f"left aside: {path}" in said
    assert "continuing after epoch 1 of 2" in said
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"))
    train(whole)
    assert measured(config) == measured(whole)
    assert_same_tensors(last(config)["model"], last(whole)["model"])


def test_broken_states_left_aside_do_not_push_out_new_ones(config, monkeypatch):
    config.optim.epochs, config.engine.keep_states = 4, 3
    train(config)
    for path in states(config)[:2]:
        path.write_bytes(b"torn")
    config.engine.keep_states, config.engine.save_steps = 2, 1
    during_training_step(monkeypatch, 3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert [path.name[-8:-6] for path in states(config)] == ["12", "09", "08", "07"]
    train(config)


@pytest.mark.parametrize("content", BREAKS.values(), ids=BREAKS)
def test_without_a_whole_state_a_run_is_refused_and_left_as_it_is(config, contents, content):
    config.engine.keep_states = 1
    train(config)
    path = break_newest(config, content)
    before = contents(RunFolder(config.output).state_folder)
    with pytest.raises(CheckpointError, match=f"no training state can be used: {path}"):
        train(config)
    assert contents(RunFolder(config.output).state_folder) == before


def test_an_optimiser_state_of_another_shape_is_refused(config):
    train(config)
    path = states(config)[0]
    state = load_state(path)
    for values in state["optimizer"]["state"].values():
        values["exp_avg"] = torch.zeros(3)
    save_state(path, state)
    config.optim.epochs, config.accept_changes = 3, True
    with pytest.raises(CheckpointError, match=r"the optimiser's exp_avg of cls_token has shape \(3,\)"):
        train(config)


def test_the_state_of_another_model_is_refused(config, tmp_path):
    train(config)
    other = copy.deepcopy(config)
    other.output, other.model.args["depth"] = str(tmp_path / "other"), "2"
    train(other)
    shutil.copy(states(config)[0], states(other)[0])
    with pytest.raises(
        CheckpointError, match=r"step_0000000006\.state does not fit the model: missing blocks\.1"
    ):
        train(other)
