"""What can go wrong in a run, each with a message a person can act on."""

from __future__ import annotations

from cbsa_torch.models.checkpoint import CheckpointError


class ConfigError(ValueError):
    """A configuration that cannot be used: an unknown key, a value of the wrong kind, a bad file."""


class DataError(ValueError):
    """Data that cannot be used: missing, empty, without labels, or an unreadable image."""

    def __init__(self, message: str) -> None:
        # torch rebuilds an error of a DataLoader worker from its traceback, whose last line is the message
        if message.startswith("Caught DataError in DataLoader worker"):
            message = message.strip().splitlines()[-1].partition("DataError: ")[2]
        super().__init__(message)


class RunFolderError(ValueError):
    """An output folder that cannot be used: it holds another run, or something that is not a run."""


class NonFiniteLossError(RuntimeError):
    """The loss or the weights became NaN or infinite; no training state was saved of it."""


class InterruptedRun(Exception):  # noqa: N818
    """A signal asked the run to stop; its state was saved, and the same command goes on from there."""


EXPECTED_ERRORS = (CheckpointError, ConfigError, DataError, RunFolderError, NonFiniteLossError, OSError)
"""Errors with a message meant for the user; anything else is a bug and keeps its traceback."""
