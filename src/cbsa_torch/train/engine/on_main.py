"""Work of the main process that may fail: its failure is that of all, or the others would wait for ever."""

from __future__ import annotations

from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list


def on_main(accelerator: Accelerator, work: Callable[[], None], expected: tuple[type[Exception], ...]) -> None:
    """Do ``work`` on the main process; to be called on every process, which all wait for it.

    Raises:
        Exception: what the main process met, if it is one of ``expected``; on every process.
    """
    met: list[Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            work()
        except expected as error:
            met[0] = error
    broadcast_object_list(met)
    if met[0] is not None:
        raise met[0]
