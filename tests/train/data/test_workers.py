"""The processes that read images end with the one that trains, whatever ends it, even stuck in a file."""

import os
import signal
import subprocess
import sys
import time

import pytest


def start(*args):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.loading", *args],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip


def running(process):
    try:
        with open(f"/proc/{process}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("start_method", "stuck", "ending", "numbers", "code"),
    [
        ("fork", "stuck", "error", [], 1),
        pytest.param("spawn", "stuck", "exit", [], 3, marks=pytest.mark.slow),
        pytest.param("fork", "stuck", "collect", [], 0, marks=pytest.mark.slow),
        ("fork", "at_work", "wait", [signal.SIGTERM, signal.SIGTERM], -signal.SIGTERM),
        ("fork", "at_work", "wait", [signal.SIGKILL], -signal.SIGKILL),
    ],
)
def test_workers_end_with_their_program(start_method, stuck, ending, numbers, code):
    process = start(start_method, stuck, ending)
    workers = [int(number) for number in process.stdout.readline().split()]
    try:
        assert len(workers) >= 2
        for number in numbers:
            process.send_signal(number)
        assert process.wait(40) == code
        deadline = time.monotonic() + 12
        while any(map(running, workers)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        if any(map(running, [process.pid, *workers])):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
