"""One run folder, one writer; whoever dies holds nothing."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cbsa_torch.train import train
from cbsa_torch.train.config import dump_yaml
from cbsa_torch.train.errors import RunFolderError
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.run.lock import FolderLock
from tests.helpers.runs import rows

fcntl = pytest.importorskip("fcntl", reason="no locks on this system")

HOLD = """
import os, sys, time
from pathlib import Path
from cbsa_torch.train.run.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.take(print)
child = os.fork() if sys.argv[2] == "with a child" else 1
print(child, flush=True) if child else None
time.sleep(60)
"""


@pytest.fixture
def hold(config):
    """Start a process that holds the folder; with a child, its number is given, too."""
    started = []

    def start(child=""):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(RunFolder(config.output).lock.path), child],
            stdout=subprocess.PIPE,
            text=True,
        )
        number = int(process.stdout.readline())
        started.append((process, number))
        return process, number

    yield start
    for process, number in started:
        process.kill()
        if number > 1:
            os.kill(number, signal.SIGKILL)
        process.stdout.close()
        process.wait()


def test_a_folder_in_use_is_refused_with_who_holds_it(config, hold):
    holder, _ = hold()
    with pytest.raises(RunFolderError, match=rf"is being written by another run: process {holder.pid} on "):
        train(config)
    assert not RunFolder(config.output).config.exists()
    holder.kill()
    holder.wait()
    train(config)
    assert len(rows(config)) == 2


def test_a_killed_holder_whose_child_lives_holds_nothing(config, hold):
    holder, child = hold("with a child")
    holder.kill()
    holder.wait()
    os.kill(child, 0)  # it is there, with the open file
    train(config)


def test_the_lock_is_free_after_a_run_and_after_a_refusal(config, monkeypatch):
    def is_free():
        code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        path = RunFolder(config.output).lock.path
        result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=False)
        return result.returncode == 0

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


def test_the_refusal_reaches_every_process(config, tmp_path):
    lock = FolderLock(RunFolder(config.output).lock.path)
    lock.take(print)
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m"]
    result = subprocess.run(
        [*launcher, "cbsa_torch.cli", "train", "--config", str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    lock.release()
    assert result.returncode == 1
    said = [line for line in result.stderr.splitlines() if f"by another run: process {os.getpid()} on" in line]
    assert len(said) == 2
    assert [item.name for item in Path(config.output).iterdir()] == [lock.path.name]
