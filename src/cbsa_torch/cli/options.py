"""Command lines: parsing into a dataclass, and checks that several commands share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from cbsa_torch.train.config import DataConfig, RunConfig, usual_workers
from cbsa_torch.train.engine.console import say
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.evaluate import open_trained
from cbsa_torch.train.free_form import FreeArgs
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.tasks.base import Trained


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


@dataclass
class OtherOptions:
    """Weights that no run wrote, and other data than a run's."""

    model: str | None = None
    """The model in timm that a plain state dict is of; other files say it."""
    args: FreeArgs = field(default_factory=dict)
    """Constructor arguments of that model, where they are not its defaults, e.g. global_pool avg."""
    root: str | None = None
    """The data in this folder instead of where the training data lay; needed for weights that no run wrote (a
    released checkpoint, a plain state dict), whose outputs are the classes there, in alphabetical order."""
    data: str | None = None
    """What lies there. Default: for classifiers "folder"; for segmenters what was trained on, e.g. "ade20k";
    "folder" is for images and masks of your own."""


@dataclass
class SizeOptions:
    """At which size images are fed."""

    native: bool = False
    """Images at their own size, several at once without padding: classifiers neither resize nor crop them,
    segmenters see them whole, not by windows; as is done without it, if the model was trained so."""
    max_tokens: int | None = None
    """With images at their own size: tokens in a forward pass; changes memory and time, not the result.
    Default: as in training."""
    max_image_tokens: int | None = None
    """Classifiers: with images at their own size, shrink those of more tokens. Default: as in training."""

    def changes(self) -> dict[str, Any]:
        """What was given of them."""
        changes: dict[str, Any] = {"native": self.native or None}
        changes |= {"max_tokens": self.max_tokens, "max_image_tokens": self.max_image_tokens}
        return {name: value for name, value in changes.items() if value is not None}

    def applied_to(self, trained: Trained) -> Trained:
        """The same model fed so; raises ConfigError for what cannot work or has no effect."""
        changes = self.changes()
        if not changes:
            return trained
        task = trained.task.with_native(changes)
        task.check()
        return trained._replace(task=task)


def parse(cls: type[Any], args: list[str], command: str, default: Any = None) -> Any:
    """Read ``args`` into the dataclass ``cls``; its docstring is the command's help."""
    kwargs = {} if default is None else {"default": default}
    description = (cls.__doc__ or "").partition("\n\n    Examples:")[0]  # those are of Python
    options = tyro.cli(cls, args=args, prog=f"cbsa {command}", description=description, **kwargs)
    if isinstance(options, RunConfig):  # what a recipe says stays where the command line says nothing else
        options.model.args = {**default.model.args, **options.model.args}
    return options


def open_on(checkpoint: str | Path, other: OtherOptions, split: str | None = None) -> Trained:
    """A trained model on other data than its own, where some are given; says how weights were read.

    Args:
        checkpoint: a run folder or a file of weights.
        other: the model that a plain state dict is of, and the data.
        split: the one that will be used.
    """
    root, data = other.root, other.data
    none = root is None and data is None
    given = None if none else DataConfig(name=data or "folder", root=root, workers=usual_workers())
    trained = open_trained(checkpoint, model=other.model, model_args=other.args, data=given, split=split)
    for note in trained.info.get("notes", ()):
        say(note)
    changes = {key: value for key, value in (("root", root), ("name", data)) if value is not None}
    if root is not None and trained.task.data_name_elsewhere is not None:
        changes.setdefault("name", trained.task.data_name_elsewhere)
    settings: Any = trained.config.data  # of the task
    return trained._replace(task=trained.task.with_data(dataclasses.replace(settings, **changes)))


def at_least(least: int, **options: int | None) -> None:
    """Raise ConfigError for an option below ``least``; None is an option that is not given."""
    for name, value in options.items():
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


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
