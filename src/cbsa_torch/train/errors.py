"""What can go wrong in a run, each with a message a person can act on."""

from __future__ import annotations

from cbsa_torch.images.errors import DataError
from cbsa_torch.models.checkpoint import CheckpointError

__all__ = [
    "EXPECTED_ERRORS",
    "ConfigError",
    "DataError",
    "InterruptedRun",
    "NonFiniteLossError",
    "RunFolderError",
]


class ConfigError(ValueError):
    """A configuration that cannot be used: an unknown key, a value of the wrong kind, a bad file."""


class RunFolderError(ValueError):
    """An output folder that cannot be used: it holds another run, or something that is not a run."""


class NonFiniteLossError(RuntimeError):
    """The loss or the weights became NaN or infinite; no training state was saved of it."""


class InterruptedRun(Exception):  # noqa: N818
    """A signal asked the run to stop; its state was saved, and the same command goes on from there."""


EXPECTED_ERRORS = (CheckpointError, ConfigError, DataError, RunFolderError, NonFiniteLossError, OSError)
"""Errors with a message meant for the user; anything else is a bug and keeps its traceback."""
