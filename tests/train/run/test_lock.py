"""One run folder, one writer; whoever dies holds nothing."""

import errno
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from cbsa_torch.train import train
from cbsa_torch.train.config import dump_yaml
from cbsa_torch.train.errors import RunFolderError
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.run.lock import FolderLock
from tests.helpers.processes import CONTEXT, run
from tests.helpers.runs import rows

fcntl = pytest.importorskip("fcntl", reason="no locks on this system")


def hold_lock(path, with_child, answer):
    """Hold the lock, and tell the number of the child that inherits the open file, or 0."""
    FolderLock(path).take(print)
    child = os.fork() if with_child else 0
    if child or not with_child:
        answer.send(child)
    time.sleep(60)


@pytest.fixture
def hold(config):
    """Start a process that holds the folder; with a child, its number is given, too."""
    started = []

    def start(with_child=False):
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(
            target=hold_lock, args=(RunFolder(config.output).lock.path, with_child, theirs)
        )
        process.start()
        started.append((process, ours.recv()))
        return started[-1]

    yield start
    for process, child in started:
        process.kill()
        process.join()
        if child:
            os.kill(child, signal.SIGKILL)


def test_a_folder_in_use_is_refused_with_who_holds_it(config, hold):
    holder, _ = hold()
    with pytest.raises(RunFolderError, match=rf"is being written by another run: process {holder.pid} on "):
        train(config)
    assert not RunFolder(config.output).config.exists()
    holder.kill()
    holder.join()
    train(config)
    assert len(rows(config)) == 2


def test_a_killed_holder_whose_child_lives_holds_nothing(config, hold):
    holder, child = hold(with_child=True)
    holder.kill()
    holder.join()
    os.kill(child, 0)  # it is there, with the open file
    train(config)
    assert len(rows(config)) == 2


def test_the_lock_is_free_after_a_run_and_after_a_refusal(config, monkeypatch):
    def is_free():
        """For another process: this one has its own locks."""
        child = os.fork()
        if not child:
            try:
                with RunFolder(config.output).lock.path.open("r+") as file:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os._exit(0)
            finally:
                os._exit(1)
        return os.waitpid(child, 0)[1] == 0

    train(config)
    assert is_free()
    config.optim.lr = 1e-4
    with pytest.raises(RunFolderError, match="another configuration"):
        train(config)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "describe", lambda *args: (_ for _ in ()).throw(OSError("full")))
        config.overwrite = True
        with pytest.raises(OSError, match="full"):
            train(config)
    assert is_free()


@pytest.mark.parametrize("missing", ["on the disk", "on the system"])
def test_without_locks_a_run_says_so_and_goes_on(config, monkeypatch, capsys, missing):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    if missing == "on the disk":
        monkeypatch.setattr(fcntl, "lockf", refuse)
    else:
        monkeypatch.setitem(sys.modules, "fcntl", None)
    train(config)
    assert f"no lock on {config.output}" in capsys.readouterr().out
    assert len(rows(config)) == 2


def test_the_refusal_reaches_every_process(config, tmp_path):
    lock = FolderLock(RunFolder(config.output).lock.path)
    lock.take(print)
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    result = run(2, "train", "--config", str(path))
    lock.release()
    assert result.returncode == 1
    said = [line for line in result.stderr.splitlines() if f"by another run: process {os.getpid()} on" in line]
    assert len(said) == 2
    assert [item.name for item in Path(config.output).iterdir()] == [lock.path.name]
