"""What can go wrong in a run, each with a message a person can act on."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot be used: an unknown key, a value of the wrong kind, a bad file."""


class DataError(ValueError):
    """Data that cannot be used: missing, empty, without labels, or an unreadable image."""


class RunFolderError(ValueError):
    """An output folder that cannot be used: it holds another run, or something that is not a run."""


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; nothing was updated with it and no checkpoint was written."""
