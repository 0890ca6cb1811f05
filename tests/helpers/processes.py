"""``cbsa`` in processes of its own, alone or as a group, without importing anything again.

A server that has imported the packages forks the processes, within a tenth of a second each where a new
interpreter takes several seconds. A group is what ``torchrun --standalone`` makes of it: the same variables and
store, and when one process fails, the others are terminated.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

from torch.distributed import TCPStore

from cbsa_torch import cli
from cbsa_torch.train.config import dump_yaml

CONTEXT = multiprocessing.get_context("forkserver")
"""All processes that tests fork come from its server; it is started with what is named here."""
CONTEXT.set_forkserver_preload(
    [
        *("tests.helpers.processes", "tests.helpers.killing", "cbsa_torch.train", "cbsa_torch.models"),
        *("sklearn.datasets", "sklearn.model_selection", "torch.utils.tensorboard", "torch.distributed.fsdp"),
    ]
)


class Result(NamedTuple):
    """How a command ended."""

    returncode: int
    """Of the first process that failed (a signal is negative), else 0."""
    stdout: str
    """Of all processes, as is stderr."""
    stderr: str


def run(count, *args, main=cli.main, timeout=120):
    """Run ``cbsa ARGS`` in ``count`` processes to its end.

    Args:
        count: processes; one alone is no group.
        args: the command line.
        main: what to call with it instead of ``cbsa``: a function of a module, or a ``functools.partial`` of one.
        timeout: seconds until they are killed and the test fails.
    """
    with Command(count, *args, main=main) as command:
        return command.wait(timeout)


def train(count, config, command="train", timeout=120):
    """Run the training of a configuration in ``count`` processes; it must succeed."""
    path = Path(f"{config.output}.yaml")
    path.write_text(dump_yaml(config))
    result = run(count, command, "--config", str(path), timeout=timeout)
    assert result.returncode == 0, result.stderr
    return result


class Command:
    """A running command, a context that leaves none of its processes; ``pids`` has them by rank."""

    def __init__(self, count, *args, main=cli.main):
        self._folder = tempfile.TemporaryDirectory(prefix="cbsa_processes_")
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        if count > 1:
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            environment |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "TORCHELASTIC_USE_AGENT_STORE": "True",  # it is there already: rank 0 makes none
                "TORCHELASTIC_RESTART_COUNT": "0",
            }
        self._processes = []
        for rank in range(count):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
            started = (args, {**environment, **ranks}, str(Path.cwd()), self._folder.name, main)
            self._processes.append(CONTEXT.Process(target=_run, args=started))
            self._processes[-1].start()

    @property
    def pids(self):
        return [process.pid for process in self._processes]

    def running(self):
        return any(process.is_alive() for process in self._processes)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    def wait(self, timeout=120):
        """The result. When a process fails, the others are terminated, and killed ten seconds later."""
        deadline, code, late = time.monotonic() + timeout, 0, False
        while alive := [process for process in self._processes if process.is_alive()]:
            wait([process.sentinel for process in alive], max(deadline - time.monotonic(), 0.1))
            failed = [process.exitcode for process in self._processes if process.exitcode]
            if failed and not code:
                code, deadline = failed[0], min(deadline, time.monotonic() + 10)
                for process in alive:
                    process.terminate()
            elif time.monotonic() > deadline:
                late |= not code
                for process in alive:
                    process.kill()
        result = Result(code, *(Path(self._folder.name, name).read_text() for name in ("stdout", "stderr")))
        assert not late, f"not finished after {timeout} s: {result}"
        return result


def _run(args, environment, folder, output, main):
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)  # of its workers: the default, as in a new interpreter
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(output, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.exit(main(args))
