"""The tasks by name, and configurations read as those of the task that they name."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

from cbsa_torch._core.checks import nearest
from cbsa_torch.train.config import RunConfig, TrainConfig, from_dict
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.free_form import read_yaml
from cbsa_torch.train.tasks.adaptation.task import Adaptation, AdaptTrainConfig
from cbsa_torch.train.tasks.base import Task
from cbsa_torch.train.tasks.classification import Classification
from cbsa_torch.train.tasks.segmentation.config import SegmentationTrainConfig
from cbsa_torch.train.tasks.segmentation.task import Segmentation
from cbsa_torch.train.tasks.slides.config import SlidesTrainConfig
from cbsa_torch.train.tasks.slides.task import SlideClassification

TASKS: dict[str, tuple[type[RunConfig], type[Any]]] = {
    TrainConfig.task: (TrainConfig, Classification),
    SegmentationTrainConfig.task: (SegmentationTrainConfig, Segmentation),
    AdaptTrainConfig.task: (AdaptTrainConfig, Adaptation),
    SlidesTrainConfig.task: (SlidesTrainConfig, SlideClassification),
}
"""For the key ``task`` of a YAML file: the configuration, and the :class:`Task` that is built with one.

To add a task, write both in a module of ``tasks`` and add a line here.
"""
RECIPES = importlib.resources.files("cbsa_torch.train") / "recipes"


def task_of(config: RunConfig) -> Task:
    """The task that a configuration is for, built with it."""
    task: Task = TASKS[config.task][1](config)
    return task


def read_config(values: Any, where: str) -> RunConfig:
    """A configuration from its values, of the task that ``values["task"]`` names (default: classification).

    Args:
        values: a mapping, as :func:`cbsa_torch.train.config.to_dict` gives it.
        where: what was read, for errors.

    Raises:
        ConfigError: an unknown task or key, or a value of another type.
    """
    if not isinstance(values, dict) or "task" not in values:
        return from_dict(TrainConfig, values, where)
    name = values["task"]
    if name not in TASKS:
        raise ConfigError(
            f"{where}: task must be one of {', '.join(map(repr, TASKS))}, got {name!r}{nearest(name, TASKS)}"
        )
    return from_dict(TASKS[name][0], {key: value for key, value in values.items() if key != "task"}, where)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(item.name.removesuffix(".yaml") for item in RECIPES.iterdir() if item.name.endswith(".yaml"))


def load_config(source: str | Path, task: str | None = None) -> Any:
    """Read a configuration from a YAML file, or from a recipe by name.

    Args:
        source: the file or the recipe.
        task: what it must be for. Default: any task.

    Raises:
        ConfigError: there is none, it cannot be read, or it is of another task.

    Examples:
        >>> from cbsa_torch.train import load_config
        >>> config = load_config("digits")
        >>> config.model.name, config.optim.epochs
        ('cbt_pico_patch1_8', 80)
    """
    if str(source) in recipe_names():
        content, name = (RECIPES / f"{source}.yaml").read_bytes(), f"recipe {source}"
    elif Path(source).is_file():
        content, name = Path(source).read_bytes(), str(source)
    else:
        raise ConfigError(
            f"no configuration {str(source)!r}: neither a file nor a recipe "
            f"({', '.join(recipe_names())}){nearest(source, recipe_names())}"
        )
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not a text file in UTF-8: {error}") from None
    values = read_yaml(text, name)
    if values is None:
        raise ConfigError(f"{name} is empty; a configuration of defaults alone is {{}}")
    config = read_config(values, name)
    if task not in (None, config.task):
        raise ConfigError(f"{name} is of the task {config.task!r}, not {task!r}")
    return config
