"""The configured model: built by timm, or taken from a weights file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from cbsa_torch._core.checks import nearest
from cbsa_torch.models import registry
from cbsa_torch.models.checkpoint import CheckpointError, refuse_fetching
from cbsa_torch.models.hub import PREFIX, fetch_weights, open_weights, weights_path
from cbsa_torch.models.resize import set_image_size
from cbsa_torch.train.config import ModelConfig, RunConfig
from cbsa_torch.train.errors import ConfigError


class Built(NamedTuple):
    """A model, and what a run needs to know about it."""

    model: nn.Module
    args: dict[str, Any]
    """Constructor arguments that rebuild it."""
    notes: tuple[str, ...] = ()
    """How weights of others were read, what was left out or changed; printed before training."""


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
        return fit(draft or _open_init_from(model_config), num_classes, model_config.image_size)
    refuse_fetching("model.args", model_config.args, "trained weights come by model.init_from", ConfigError)
    known = timm.list_models()
    if model_config.name not in known:
        suggestion = nearest(model_config.name, registry.names()) or nearest(model_config.name, known)
        raise ConfigError(f"no model {model_config.name!r} in timm{suggestion}; `cbsa list` shows ours")
    args = dict(model_config.args)
    if model_config.image_size is not None:
        args["img_size"] = model_config.image_size
    if num_classes is not None:
        args["num_classes"] = num_classes
    try:
        return Built(timm.create_model(model_config.name, **args), args)
    except Exception as error:  # constructors of any model of timm, called with anything
        raise ConfigError(f"cannot build {model_config.name} with {args}: {error}") from error


def open_source(
    key: str, source: str | None, name: str | None = None, args: Mapping[str, Any] | None = None
) -> tuple[nn.Module, dict[str, Any], Path]:
    """A trained model as it is, what its file says about it, and that file.

    Args:
        key: of the configuration, for errors.
        source: what it was set to.
        name, args: of the model in timm, which a plain state dict does not say. A file that does must agree.
    """
    if not source:
        raise ConfigError(
            f"{key} is required here: a run's folder, a .safetensors file of ours, a released "
            f"checkpoint of the official code (.pth, .pth.tar), a plain state dict, or {PREFIX}user/name"
        )
    # Only by its prefix: a mistyped folder must not fetch somebody's repository of that name.
    path = fetch_weights(source) if source.startswith(PREFIX) else weights_path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{key}: no weights file at {path}")
    try:
        model, info = open_weights(path, name, args)
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from error
    return model, info, path


def _open_init_from(model_config: ModelConfig) -> Built:
    """The model of ``model.init_from``."""
    asked = model_config.init_from, model_config.name, model_config.args
    model, info, _ = open_source("model.init_from", *asked)
    return Built(model, dict(info["model_args"]), tuple(info.get("notes", ())))


def fit(built: Built, num_classes: int | None, image_size: int | None) -> Built:
    """A trained model with a new head and another image size, where asked for.

    Raises:
        ConfigError: the model takes images of one size only.
    """
    model: Any = built.model
    args, notes = dict(built.args), list(built.notes)
    trained = getattr(model, "num_classes", args.get("num_classes"))
    if num_classes is not None and num_classes != trained:
        model.reset_classifier(num_classes)
        args["num_classes"] = num_classes
        notes.append(f"new head for {num_classes} classes (the weights have {trained or 'none'})")
    if image_size is not None:
        try:
            notes.append(set_image_size(model, image_size))
        except ValueError as error:
            raise ConfigError(f"model.image_size: {error}") from error
        args["img_size"] = image_size
    return Built(model, args, tuple(notes))
