from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cbsa_torch.train.config import TrainConfig
from cbsa_torch.train.engine import tracking
from cbsa_torch.train.engine.accelerate import new_accelerator
from cbsa_torch.train.engine.tracking import (
    check_tracker,
    finish_trackers,
    hyperparameters,
    log,
    start_trackers,
    tracker_names,
)
from cbsa_torch.train.errors import ConfigError


class Fake(GeneralTracker):
    """Remembers what it was told, draws random numbers, and fails on demand."""

    name = "fake"
    requires_logging_directory = False

    def __init__(self, fails: str = ""):
        super().__init__()
        self.fails, self.calls = fails, []

    @property
    def tracker(self):
        return self

    def _call(self, kind, *args):
        random.random(), np.random.rand(), torch.rand(1)
        self.calls.append((kind, *args))
        if kind == self.fails:
            raise ConnectionError("nobody answers")

    def start(self):
        self._call("start")

    def store_init_configuration(self, values):
        self._call("config", values)

    def log(self, values, step=None, **kwargs):
        self._call("log", values, step)

    def finish(self):
        self._call("finish")


def accelerator_with(*trackers) -> Accelerator:
    return new_accelerator(cpu=True, log_with=list(trackers))


def test_a_tracker_gets_settings_and_numbers():
    fake, said = Fake(), []
    accelerator = accelerator_with(fake)
    start_trackers(accelerator, TrainConfig(output="runs/a"), said.append)
    log(accelerator, {"val_top1": 0.5, "val_top5": None}, 3, said.append)
    finish_trackers(accelerator, said.append)
    kinds = [call[0] for call in fake.calls]
    assert kinds == ["start", "config", "log", "finish"]
    settings = fake.calls[1][1]
    assert settings["optim.lr"] == TrainConfig().optim.lr
    assert fake.calls[2] == ("log", {"val_top1": 0.5}, 3)
    assert not said
    assert not accelerator.trackers


@pytest.mark.parametrize("fails", ["start", "config", "log", "finish"])
def test_a_failing_tracker_is_named_once_and_the_others_go_on(fails):
    fake, healthy, said = Fake(fails), Fake(), []
    accelerator = accelerator_with(fake, healthy)
    start_trackers(accelerator, TrainConfig(), said.append)
    for step in (1, 2):
        log(accelerator, {"loss": 1.0}, step, said.append)
    finish_trackers(accelerator, said.append)
    assert len(said) == 1
    assert "nobody answers" in said[0]
    assert "metrics.jsonl" in said[0]
    assert sum(call[0] == fails for call in fake.calls) == 1
    if fails in ("log", "finish"):
        assert sum(call[0] == "log" for call in healthy.calls) == 2
        assert healthy.calls[-1] == ("finish",)


def test_ctrl_c_in_a_tracker_is_not_swallowed():
    class Interrupted(Fake):
        def log(self, values, step=None, **kwargs):
            raise KeyboardInterrupt

    accelerator = accelerator_with(Interrupted())
    start_trackers(accelerator, TrainConfig())
    with pytest.raises(KeyboardInterrupt):
        log(accelerator, {"loss": 1.0}, 1)


def test_a_tracker_does_not_change_the_random_numbers_of_training():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def seed():
        random.seed(0), np.random.seed(0), torch.manual_seed(0)

    seed()
    expected = draw()
    for fails in ("", "log"):
        accelerator = accelerator_with(Fake(fails))
        seed()
        start_trackers(accelerator, TrainConfig())
        log(accelerator, {"loss": 1.0}, 1, lambda _: None)
        finish_trackers(accelerator)
        assert draw() == expected


def test_tensorboard_events_read_back(tmp_path):
    said = []
    config = TrainConfig(output=str(tmp_path))
    accelerator = new_accelerator(cpu=True, log_with=tracker_names("tensorboard"), project_dir=tmp_path)
    start_trackers(accelerator, config, said.append)
    for step, loss in enumerate((2.0, 1.5), start=1):
        log(accelerator, {"val_loss": loss, "note": "no number"}, step, said.append)
    finish_trackers(accelerator, said.append)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("val_loss")] == [(1, 2.0), (2, 1.5)]
    assert events.Tags()["scalars"] == ["val_loss"]
    assert list((tmp_path / "tensorboard").rglob("hparams.yml"))
    assert not said


FULL_DISK = """
import resource, sys
from cbsa_torch.train.config import TrainConfig
from cbsa_torch.train.engine.accelerate import new_accelerator
from cbsa_torch.train.engine.tracking import finish_trackers, log, start_trackers
config, said = TrainConfig(output=sys.argv[1]), []
accelerator = new_accelerator(cpu=True, log_with="tensorboard", project_dir=sys.argv[1])
if sys.argv[2] == "later":
    start_trackers(accelerator, config, said.append)
    log(accelerator, {"loss": 1.0}, 0, said.append)
assert not said, said
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # a full disk: no file grows any more
if sys.argv[2] == "start":
    start_trackers(accelerator, config, said.append)
for step in range(1, 60):
    log(accelerator, {"loss": 1.0}, step, said.append)
finish_trackers(accelerator, said.append)
assert len(said) == 1, said
print("trained to the end;", said[0])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
@pytest.mark.parametrize("when", ["start", "later"])
def test_a_full_disk_under_tensorboard_neither_stops_nor_hangs_the_run(tmp_path, when):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), when]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert "trained to the end; tracker tensorboard" in result.stdout
    assert "File too large" in result.stdout


def test_names(monkeypatch):
    for name in ("tensorboard", "none"):
        check_tracker(name)
    assert tracker_names("none") is None
    assert tracker_names("wandb") == ["wandb"]
    with pytest.raises(
        ConfigError, match=r"engine\.tracker must be one of .*none, got 'wandbb'; did you mean 'wandb'"
    ):
        check_tracker("wandbb")
    with pytest.raises(ConfigError, match="got 'all'"):
        check_tracker("all")
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(ConfigError, match="not installed here: pip install comet-ml"):
        check_tracker("comet_ml")
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "mine", Fake)
    check_tracker("mine")


def test_hyperparameters_are_flat_and_plain():
    config = TrainConfig()
    config.model.args = {"contraction": "exact"}
    flat = hyperparameters(config)
    assert flat["model.args.contraction"] == "exact"
    assert flat["model.image_size"] == "none"
    assert flat["data.crop_scale"] == "[0.08, 1.0]"
    assert flat["resume"] is False
    assert {type(value) for value in flat.values()} <= {bool, int, float, str}
