"""One writer per run folder: a lock that the system takes back when its process dies, however it dies."""

from __future__ import annotations

import datetime
import errno
import importlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cbsa_torch.train.errors import RunFolderError

BUSY = (errno.EACCES, errno.EAGAIN)
"""What the system answers where another process holds the lock."""


class FolderLock:
    """Holds ``path``, a file that says who holds it; it stays when the lock is released.

    The lock belongs to this process alone (POSIX record lock, ``fcntl.lockf``) and ends with it, killed or not,
    though children that inherited the open file (workers of a loader) live on. Threads of one process do not
    exclude each other.

    Args:
        path: of the lock's file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def take(self, say: Callable[[str], None]) -> None:
        """Take the lock, creating its folder; where the system or the disk has no locks, say so and go on.

        Raises:
            RunFolderError: another process holds it; the message says which.
        """
        try:
            fcntl: Any = importlib.import_module("fcntl")
        except ImportError:  # Windows
            say(f"no lock on {self.path.parent}: this system has none; let no second run write there")
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 500).decode(errors="replace").strip() or "a process of unknown name"
            os.close(descriptor)
            if error.errno in BUSY:
                raise RunFolderError(
                    f"output {self.path.parent} is being written by another run: {holder}; wait until it ends, "
                    "stop it, or choose another --output"
                ) from None
            say(f"no lock on {self.path.parent} ({error}); let no second run write there")
            return
        self._descriptor = descriptor
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {now}\n".encode())

    def release(self) -> None:
        """Let others have it; nothing happens where it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)  # which releases it
            self._descriptor = None
