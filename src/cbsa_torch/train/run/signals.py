"""What happens on Ctrl-C (SIGINT) and SIGTERM while a run trains.

The first one is noted here. :mod:`cbsa_torch.train.trainer` asks for it after every optimiser step, before
every batch of validation and after every epoch, on all processes together. It then saves the training state and
raises InterruptedRun, for which the command exits with code 75. The second one acts as outside of a run.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequests:
    """A context in which the first SIGINT or SIGTERM is noted; the second acts as it does outside.

    In a thread other than the main one Python delivers no signals, and nothing is noted.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, signal._HANDLER | None] = {}

    def __bool__(self) -> bool:
        return self.received is not None

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            # What is ignored (Ctrl-C by jobs in the background) stays so.
            not_ignored = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in not_ignored}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            # None: installed by a program in C around Python, which cannot put it back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}
