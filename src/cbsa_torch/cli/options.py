"""Command lines: parsing into a dataclass, and checks that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tyro
from rich.table import Table

from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.run.folder import RunFolder


@dataclass
class PageOptions:
    """What every page about runs can be told."""

    images: int = 256
    """How many test images measure the coding rates."""
    shown: int = 6
    """How many test images get attention maps."""
    robustness_images: int = 128
    """How many test images measure the robustness; 0 leaves it out."""

    def counts(self) -> dict[str, int]:
        """The numbers of images, checked."""
        at_least(1, images=self.images, shown=self.shown)
        at_least(0, robustness_images=self.robustness_images)
        return {"images": self.images, "shown": self.shown, "robustness_images": self.robustness_images}


def parse(cls: type[Any], args: list[str], command: str, default: Any = None) -> Any:
    """Read ``args`` into the dataclass ``cls``; its docstring is the command's help."""
    kwargs = {} if default is None else {"default": default}
    return tyro.cli(cls, args=args, prog=f"cbsa {command}", description=cls.__doc__, **kwargs)


def at_least(least: int, **options: int | None) -> None:
    """Raise ConfigError for an option below ``least``; None is an option that is not given."""
    for name, value in options.items():
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def number_table(*headings: str, left: int) -> Table:
    """A table without lines, whose columns after the first ``left`` hold numbers, aligned to the right."""
    table = Table(*headings, box=None, pad_edge=False)
    for column in table.columns[left:]:
        column.justify = "right"
    return table


def resumed(args: list[str], default: str) -> str | None:
    """The configuration in the run's own folder (``--output``) if ``--resume`` is given; None without one."""
    if "--resume" not in args:
        return None
    own = RunFolder(take_option("--output", args)[0] or default).config
    return str(own) if own.exists() else None


def take_option(name: str, args: list[str]) -> tuple[str | None, list[str]]:
    """The value of ``--name VALUE`` or ``--name=VALUE``, and the arguments without it."""
    for i, arg in enumerate(args):
        if arg.startswith(f"{name}="):
            return arg.partition("=")[2], args[:i] + args[i + 1 :]
        if arg == name:
            if i + 1 == len(args):
                raise ConfigError(f"{name} needs a value")
            return args[i + 1], args[:i] + args[i + 2 :]
    return None, args
