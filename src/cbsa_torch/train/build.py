"""The configured model: built by timm, or taken from a weights file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from torch import nn

from cbsa_torch._core.checks import nearest
from cbsa_torch.models import registry
from cbsa_torch.models.checkpoint import FETCHING_ARGS
from cbsa_torch.models.hub import PREFIX, fetch_weights, open_weights, weights_path
from cbsa_torch.train.config import ModelConfig, RunConfig
from cbsa_torch.train.errors import ConfigError

Built = tuple[nn.Module, dict[str, Any]]
"""A model and the constructor arguments that rebuild it."""


def draft_model(config: RunConfig) -> Built:
    """The configured model before the classes are known: it tells what images it takes.

    With ``model.init_from`` it has its weights already; else it has no values at all (device "meta"), which
    takes no time and draws no random numbers.
    """
    if config.model.init_from is not None:
        return _open_init_from(config.model)
    with torch.device("meta"):
        return build_model(config, None)


def build_model(config: RunConfig, num_classes: int | None, draft: Built | None = None) -> Built:
    """The configured model and the constructor arguments that rebuild it.

    Args:
        num_classes: of the data. Default: the model's own.
        draft: of :func:`draft_model`, whose weights are used where it has any.

    Raises:
        ConfigError: it cannot be built.
    """
    model_config = config.model
    if model_config.init_from is not None:
        return _fit(model_config, num_classes, *(draft or _open_init_from(model_config)))
    fetching = sorted(FETCHING_ARGS & model_config.args.keys())
    if fetching:
        raise ConfigError(
            f"model.args {fetching[0]} is not allowed (a weights file could not be opened with it); trained "
            "weights come by model.init_from"
        )
    known = timm.list_models()
    if model_config.name not in known:
        suggestion = nearest(model_config.name, registry.names()) or nearest(model_config.name, known)
        raise ConfigError(f"no model {model_config.name!r} in timm{suggestion}; `cbsa list` shows ours")
    args = read_args(model_config)
    if model_config.image_size is not None:
        args["img_size"] = model_config.image_size
    if num_classes is not None:
        args["num_classes"] = num_classes
    try:
        return timm.create_model(model_config.name, **args), args
    except Exception as error:  # constructors of any model of timm, called with anything
        raise ConfigError(f"cannot build {model_config.name} with {args}: {error}") from error


def read_args(model_config: ModelConfig) -> dict[str, Any]:
    """The values of ``model.args``, which are kept as YAML; raises ConfigError where they are none."""
    try:
        return {k: yaml.safe_load(v) if isinstance(v, str) else v for k, v in model_config.args.items()}
    except yaml.YAMLError as error:
        raise ConfigError(f"model.args are not values of YAML: {error}") from error


def open_source(key: str, source: str | None) -> tuple[nn.Module, dict[str, Any], Path]:
    """A trained model as it is, what its file says about it, and that file.

    Args:
        key: of the configuration, for errors.
        source: what it was set to.
    """
    if not source:
        raise ConfigError(
            f"{key} is required here: a run's folder, a .safetensors file of ours, a released "
            f"checkpoint of the official code (.pth, .pth.tar), or {PREFIX}user/name"
        )
    # Only by its prefix: a mistyped folder must not fetch somebody's repository of that name.
    path = fetch_weights(source) if source.startswith(PREFIX) else weights_path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{key}: no weights file at {path}")
    model, info = open_weights(path)
    return model, info, path


def _open_init_from(model_config: ModelConfig) -> Built:
    """The model of ``model.init_from``."""
    model, info, path = open_source("model.init_from", model_config.init_from)
    if info["model"] != model_config.name:
        raise ConfigError(
            f"model.init_from {path} holds {info['model']!r}, but model.name is {model_config.name!r}"
        )
    if model_config.args:
        raise ConfigError("model.args cannot be changed together with model.init_from")
    return model, dict(info["model_args"])


def _fit(model_config: ModelConfig, num_classes: int | None, model: Any, args: dict[str, Any]) -> Built:
    """A trained model with a new head and another image size, where asked for."""
    if num_classes is not None and num_classes != args.get("num_classes"):
        model.reset_classifier(num_classes)
        args["num_classes"] = num_classes
    if model_config.image_size is not None:
        model.set_input_size(img_size=model_config.image_size)
        args["img_size"] = model_config.image_size
    return model, args
