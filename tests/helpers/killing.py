"""Kill a training process at a chosen moment: during a step, or before, within and after every write."""

import os
import signal
from pathlib import Path

from cbsa_torch._core import files
from cbsa_torch.train import losses, train
from tests.helpers.processes import CONTEXT


class _Events:
    """Counts moments, and ends the process at one of them with the signal that nobody can catch."""

    def __init__(self, fatal: int) -> None:
        self.count, self.fatal = 0, fatal

    def pass_one(self, prepare=lambda: None) -> None:
        self.count += 1
        if self.count == self.fatal:
            prepare()
            os.kill(os.getpid(), signal.SIGKILL)


def _train(config, fatal, counted):
    events = _Events(fatal)
    fsync, replace, loss = os.fsync, Path.replace, losses.mean_loss

    def killed_fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112
            events.pass_one()
            fsync(descriptor)
            return
        # Half of the file has reached the disk.
        events.pass_one(lambda: os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2))
        fsync(descriptor)
        events.pass_one()

    def killed_replace(path, target):
        events.pass_one()
        result = replace(path, target)
        events.pass_one()
        return result

    def killed_loss(logits, targets, *options):
        if logits.requires_grad:
            events.pass_one()
        return loss(logits, targets, *options)

    files.os.fsync = killed_fsync
    Path.replace = killed_replace
    losses.mean_loss = killed_loss
    train(config)
    counted.put(events.count)


def train_and_kill(config, fatal=0):
    """Train in another process, killed at moment number ``fatal`` (from 1).

    Returns:
        How many moments there were; None if it was killed.
    """
    counted = CONTEXT.Queue()
    process = CONTEXT.Process(target=_train, args=(config, fatal, counted))
    process.start()
    process.join(60)
    if process.exitcode == -signal.SIGKILL:
        return None
    assert process.exitcode == 0, f"exit code {process.exitcode}"
    return counted.get(timeout=10)
