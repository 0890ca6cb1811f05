"""A disk that is full or read-only: a clear error, and the states before it intact."""

import dataclasses
import errno
import multiprocessing
import resource
import sys
from pathlib import Path

import pytest
import torch

from cbsa_torch.models import load_checkpoint
from cbsa_torch.train import train, trainer
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.run.state import TrainingStates
from tests.helpers.runs import assert_same_tensors, last, measured

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def _train_on_a_full_disk(config, from_epoch, answer):
    torch.set_num_threads(1)
    run_epoch = trainer._run_epoch

    def patched(session, progress):
        if progress.epoch == from_epoch:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))  # files grow no further than 1 kB
        run_epoch(session, progress)

    trainer._run_epoch = patched
    try:
        train(config)
    except OSError as error:
        answer.put(str(error))
    else:
        answer.put(None)


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
@pytest.mark.parametrize("from_epoch", [0, 1])
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(config, tmp_path, from_epoch):
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"))
    train(whole)
    answer = CONTEXT.Queue()
    process = CONTEXT.Process(target=_train_on_a_full_disk, args=(config, from_epoch, answer))
    process.start()
    message = answer.get(timeout=50)
    process.join(20)
    assert message is not None
    assert "File too large" in message
    kept = "there is no training state yet" if from_epoch == 0 else "the last training state is that of epoch 1"
    assert kept in message
    assert str(RunFolder(config.output).path) in message
    assert len(RunFolder(config.output).states().paths()) == from_epoch
    assert not list(Path(config.output).rglob("*.tmp"))
    if from_epoch:
        load_checkpoint(RunFolder(config.output).weights)
    train(config)
    assert measured(config) == measured(whole)
    assert_same_tensors(last(config)["model"], last(whole)["model"])


def test_a_read_only_folder_is_named_before_anything_is_trained(config, monkeypatch):
    def refuse(path, *args, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(trainer, "train_one_epoch", lambda *args, **options: pytest.fail("trained"))
    with pytest.raises(OSError, match=f"Read-only file system.*{config.output}"):
        train(config)


def test_the_newest_few_states_are_kept_and_old_ones_go_last(tmp_path, monkeypatch):
    states = TrainingStates(tmp_path, keep=2)
    for step in (1, 2, 10):
        states.save(step, {"step": step})
    assert [path.name for path in states.paths()] == ["step_0000000010.state", "step_0000000002.state"]

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cbsa_torch._core.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        states.save(11, {"step": 11})
    assert [path.name for path in states.paths()] == ["step_0000000010.state", "step_0000000002.state"]


def test_a_broken_state_of_a_later_step_does_not_push_out_a_whole_one(tmp_path):
    kept = TrainingStates(tmp_path, keep=2)
    for step in (10, 20):
        kept.save(step, {"step": step})
    path = kept.paths()[0]
    path.write_bytes(path.read_bytes()[:-5])
    kept = TrainingStates(tmp_path, keep=1)
    kept.save(15, {"step": 15})
    newest, problems = kept.newest()
    assert newest == tmp_path / "step_0000000015.state"
    assert "step_0000000020.state" in " ".join(problems)
