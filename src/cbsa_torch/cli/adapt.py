"""`cbsa adapt`: other attention for a pretrained ViT, and the training that recovers its accuracy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from cbsa_torch.cli.options import parse, resumed, take_option
from cbsa_torch.models.checkpoint import is_ours, read_info
from cbsa_torch.models.hub import PREFIX, weights_path
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.registry import load_config, read_config, task_of
from cbsa_torch.train.tasks.adaptation.stages import recover
from cbsa_torch.train.tasks.adaptation.task import AdaptTrainConfig

USAGE = """usage: cbsa adapt --model RUN_OR_TIMM_NAME [--weights FILE] [--data NAME] [--config RECIPE] [options]

  --model         short for --model.original
  --weights       short for --model.weights: a file with the weights of the timm model that --model names
  --data          short for --data.name. Default: the data and the augmentation that a run was trained with
  --config        a recipe or YAML file of the task adaptation: the defaults that are shown below. Default: the
                  paper's recipe (section 4.2)
  --stage-epochs  adapt layer by layer, from the last to the first, and train so long after each; the last
                  stage trains for --optim.epochs

Later options win.
"""


def run(args: list[str]) -> None:
    """Adapt a ViT and recover its accuracy."""
    source, rest = take_option("--config", args)
    model, rest = take_option("--model", rest)
    weights, rest = take_option("--weights", rest)
    data, rest = take_option("--data", rest)
    staged, rest = take_option("--stage-epochs", rest)
    if staged is not None and not staged.isdecimal():
        raise ConfigError(f"--stage-epochs must be a whole number, got {staged!r}")
    if source is None:
        source = resumed(rest, AdaptTrainConfig().output)
    default = AdaptTrainConfig() if source is None else load_config(source, AdaptTrainConfig.task)
    if model is not None:
        if source is None:
            default = with_data_of(default, model)
        rest = ["--model.original", model, *rest]
    if weights is not None:
        rest = ["--model.weights", weights, *rest]
    if data is not None:
        rest = ["--data.name", data, *rest]
    if {"-h", "--help"} & set(rest):
        print(USAGE)
    recover(parse(AdaptTrainConfig, rest, "adapt", default), None if staged is None else int(staged))


def with_data_of(config: AdaptTrainConfig, model: str) -> AdaptTrainConfig:
    """The configuration with the data and the augmentation that a model was trained with, where it says."""
    path = Path(model)
    if model.startswith(PREFIX) or not path.exists() or not is_ours(weights_path(path)):
        return config
    info = read_info(weights_path(path))
    if "config" not in info:
        return config
    trained = task_of(read_config(info["config"], f"{model}: config"))
    data: Any = trained.config.data
    return dataclasses.replace(config, data=data) if trained.one_class_per_image else config
