"""The processes that read images for a loader: they end with the process that trains, and only with it.

A worker ignores SIGINT and SIGTERM, which job schedulers, ``timeout`` and a terminal's Ctrl-C send to the whole
group of processes: else it would die before the trainer has saved the run. As it may also be stuck in a file,
the trainer kills its workers when it ends. Workers whose trainer was killed end by themselves: torch lets them
look for it every five seconds.
"""

from __future__ import annotations

import atexit
import copy
import functools
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.context import BaseContext
from typing import Any

from torch.utils.data import DataLoader


def ignore_signals_in_workers(loader: DataLoader[Any]) -> None:
    """Let a loader's workers, if it has any, be ended by the process that trains alone.

    The first call for a loader with workers registers an exit handler of this process; it kills such workers.
    """
    if loader.num_workers:
        loader.multiprocessing_context = _worker_context()
        loader.worker_init_fn = functools.partial(_start_worker, then=loader.worker_init_fn)
        _register_exit_handler()


class _Worker(multiprocessing.Process):
    """A process that ``terminate`` ends for certain."""

    def terminate(self) -> None:
        self.kill()


def _worker_context() -> BaseContext:
    """The context that is the default one but for the kind of process."""
    context = copy.copy(multiprocessing.get_context())
    context.Process = _Worker  # type: ignore[misc]
    return context


def _start_worker(number: int, then: Callable[[int], None] | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if then is not None:
        then(number)


@functools.cache
def _register_exit_handler() -> None:
    # It runs before that of multiprocessing, which was registered earlier: that one sends SIGTERM, and waits.
    atexit.register(kill_workers)


def kill_workers() -> None:
    """Kill the workers of this process that are still there, and wait for their end.

    The handler of SIGCHLD is put back afterwards. Meanwhile there is none: torch's raises when a worker dies.
    """
    workers = [child for child in multiprocessing.active_children() if isinstance(child, _Worker)]
    if not workers:
        return
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None  # Windows has none
    if handler is not None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()
    finally:
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)
