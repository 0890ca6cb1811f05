"""Looking into run folders, refusals, and disturbing a training step."""

import copy
import json
import time
from pathlib import Path

import pytest
import torch

from cbsa_torch.train import losses, train
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.run.state import read_state

STEPS = 3
"""Steps of one epoch of the tiny configuration."""


def elsewhere(config, output):
    """The same configuration with another folder."""
    other = copy.deepcopy(config)
    other.output = str(output)
    return other


def last(config):
    return read_state(states(config)[0])


def states(config):
    """The files of the trainer's states, newest first."""
    return RunFolder(config.output).states().paths()


def wait_for_state(command, config) -> None:
    """Wait until a running command has saved a state of its run."""
    deadline = time.monotonic() + 50
    while not states(config):
        assert command.running()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def rows(config) -> list[dict]:
    return [json.loads(line) for line in RunFolder(config.output).metrics.read_text().splitlines()]


def measured(config) -> list[dict]:
    return [
        {k: v for k, v in row.items() if k not in ("images_per_second", "data_wait")} for row in rows(config)
    ]


def assert_same_tensors(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=0, rtol=0, msg=name)


def assert_same_run(config, other) -> None:
    """The same metrics of every epoch, and the same last weights."""
    assert measured(config) == measured(other)
    assert_same_tensors(last(config)["model"], last(other)["model"])


def contents(folder) -> dict[str, bytes] | None:
    """Every file under a folder by name, None where there is no folder."""
    root = Path(folder)
    files = {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
    return files if root.exists() else None


def assert_refused(config, error, message, start=train, folder=None) -> None:
    """The run does not start, and its folder (or a given one) stays as it is, or is not made."""
    before = contents(folder or config.output)
    with pytest.raises(error, match=message):
        start(config)
    assert contents(folder or config.output) == before


def during_training_step(monkeypatch, number, act) -> None:
    """Replace the loss of training step ``number`` (from 1) by ``act(loss, logits)``."""
    original, count = losses.mean_loss, 0

    def patched(logits, targets, *options):
        nonlocal count
        loss = original(logits, targets, *options)
        if not logits.requires_grad:
            return loss
        count += 1
        return act(loss, logits) if count == number else loss

    monkeypatch.setattr(losses, "mean_loss", patched)


def interrupt(*args):
    raise KeyboardInterrupt


def interrupt_training(config, step, start=train) -> None:
    """Train until Ctrl-C in training step ``step`` (from 1)."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        during_training_step(patch, step, interrupt)
        start(config)
