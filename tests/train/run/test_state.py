"""Training states: read back whole, or refused."""

import errno
import hashlib
import random

import numpy as np
import pytest
import torch

from cbsa_torch.models.checkpoint import CheckpointError
from cbsa_torch.train.run.state import (
    MAGIC,
    TrainingStates,
    random_states,
    read_state,
    restore_random_states,
    write_state,
)
from tests.helpers.damage import Trap, flip_bit

WEIGHTS = {"w": torch.linspace(-1, 1, 5000)}


def test_a_state_reads_back(tmp_path):
    state = {"progress": {"epoch": 3}, "model": {"w": torch.arange(3)}, "ema": None}
    write_state(tmp_path / "last.pt", state)
    found = read_state(tmp_path / "last.pt")
    assert torch.equal(found["model"]["w"], torch.arange(3))
    assert (found["progress"], found["ema"]) == ({"epoch": 3}, None)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 torn", b"\x80\x02", b"\xff" * 64, b"(lp0\n."])
def test_what_is_no_state_is_refused(tmp_path, content):
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.pt is not a training state"):
        read_state(tmp_path / "last.pt")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_a_truncated_state_and_one_with_a_flipped_bit_are_refused(tmp_path, share):
    path = tmp_path / "last.pt"
    write_state(path, {"model": WEIGHTS})
    whole = path.read_bytes()
    for spoil in (flip_bit, lambda path, share: path.write_bytes(whole[: int(share * len(whole)) - 1])):
        path.write_bytes(whole)
        spoil(path, share)
        with pytest.raises(CheckpointError, match=r"last\.pt is (not a training state|truncated or altered)"):
            read_state(path)


def test_a_missing_state_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"last\.pt"):
        read_state(tmp_path / "last.pt")


def test_a_malicious_state_is_refused_unexecuted(tmp_path):
    path, victim = tmp_path / "last.pt", tmp_path / "created"
    torch.save({"progress": Trap(victim)}, path)
    pickled = path.read_bytes()
    with pytest.raises(CheckpointError, match="is not a training state"):
        read_state(path)
    # An attacker knows how checksums are made.
    path.write_bytes(MAGIC + hashlib.sha256(pickled).hexdigest().encode() + pickled)
    with pytest.raises(CheckpointError, match="holds no training state: Weights only load failed"):
        read_state(path)
    assert not victim.exists()


def test_random_states_read_back_from_a_file(tmp_path):
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]

    draw()
    write_state(tmp_path / "last.pt", {"random": random_states()})
    expected = draw()
    restore_random_states(read_state(tmp_path / "last.pt")["random"])
    assert draw() == expected


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
