"""Command lines: parsing into a dataclass, and checks that several commands share."""

from __future__ import annotations

from typing import Any

import tyro

from cbsa_torch.train.errors import ConfigError


def parse(cls: type[Any], args: list[str], command: str, default: Any = None) -> Any:
    """Read ``args`` into the dataclass ``cls``; its docstring is the command's help."""
    kwargs = {} if default is None else {"default": default}
    return tyro.cli(cls, args=args, prog=f"cbsa {command}", description=cls.__doc__, **kwargs)


def at_least(least: int, **options: int) -> None:
    """Raise ConfigError for an option below ``least``."""
    for name, value in options.items():
        if value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
