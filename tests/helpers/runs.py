"""Looking into run folders, and disturbing a training step."""

import copy
import json

import torch

from cbsa_torch.train import losses
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


def during_training_step(monkeypatch, number, act) -> None:
    """Replace the loss of training step ``number`` (from 1) by ``act(loss, logits)``."""
    original, count = losses.mean_loss, 0

    def patched(logits, targets, label_smoothing=0.0):
        nonlocal count
        loss = original(logits, targets, label_smoothing)
        if not logits.requires_grad:
            return loss
        count += 1
        return act(loss, logits) if count == number else loss

    monkeypatch.setattr(losses, "mean_loss", patched)


def interrupt(loss, logits):
    raise KeyboardInterrupt
