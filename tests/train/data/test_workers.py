"""The processes that read images end with the one that trains, whatever ends it, even stuck in a file."""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from multiprocessing import util

import pytest
from torch.utils.data import DataLoader

from cbsa_torch.train.data import workers
from tests.helpers import loading
from tests.helpers.processes import CONTEXT


def test_importing_registers_nothing():
    def registered():
        return atexit._ncallbacks(), len(util._finalizer_registry), signal.getsignal(signal.SIGCHLD)

    before = registered()
    runpy.run_path(workers.__file__)
    assert registered() == before


def test_workers_are_killed_and_the_handler_of_their_signal_stays():
    before = signal.getsignal(signal.SIGCHLD)
    signal.signal(signal.SIGCHLD, lambda *arguments: None)  # the user's own
    try:
        loader = DataLoader(range(100), num_workers=2)
        workers.ignore_signals_in_workers(loader)
        batches = iter(loader)
        next(batches)
        handler = signal.getsignal(signal.SIGCHLD)
        children = multiprocessing.active_children()
        other = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        other.start()
        workers.kill_workers()
        assert len(children) >= 2
        assert multiprocessing.active_children() == [other]
        assert signal.getsignal(signal.SIGCHLD) is handler
        other.kill()
        other.join()
        del batches
    finally:
        signal.signal(signal.SIGCHLD, before)


def is_running(process):
    try:
        with open(f"/proc/{process}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_ended(workers):
    assert len(workers) >= 2
    deadline = time.monotonic() + 12  # a worker looks for its parent every five seconds
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("start_method", "ending", "code"),
    [
        ("fork", "error", 1),
        pytest.param("spawn", "exit", 3, marks=pytest.mark.slow),
        pytest.param("fork", "collect", 0, marks=pytest.mark.slow),
    ],
)
def test_stuck_workers_end_with_their_program(start_method, ending, code):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.loading", start_method, "stuck", ending],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    workers = [int(number) for number in process.stdout.readline().split()]
    try:
        assert process.wait(40) == code
        assert_ended(workers)
    finally:
        if any(map(is_running, [process.pid, *workers])):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(
    ("stuck", "ending", "numbers", "code"),
    [
        ("at_work", "wait", [signal.SIGTERM, signal.SIGTERM], -signal.SIGTERM),
        ("at_work", "wait", [signal.SIGKILL], -signal.SIGKILL),
        ("stuck", "error", [], 1),
    ],
)
def test_workers_end_with_a_process_of_multiprocessing(stuck, ending, numbers, code):
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=loading.run, args=("fork", stuck, ending, theirs.send))
    process.start()
    workers = [int(number) for number in ours.recv().split()]
    try:
        for number in numbers:
            os.kill(process.pid, number)
        process.join(40)
        assert process.exitcode == code
        assert_ended(workers)
    finally:
        for number in filter(is_running, [process.pid, *workers]):
            os.kill(number, signal.SIGKILL)
