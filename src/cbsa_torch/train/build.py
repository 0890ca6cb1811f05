"""The configured model: built by timm, or taken from a checkpoint."""

from __future__ import annotations

from typing import Any

import timm
import yaml
from torch import nn

from cbsa_torch._core.checks import nearest
from cbsa_torch.models import registry
from cbsa_torch.models.checkpoint import PICKLE_SUFFIXES, load_checkpoint
from cbsa_torch.models.convert import read_official
from cbsa_torch.models.hub import PREFIX, fetch_weights, weights_path
from cbsa_torch.train.config import TrainConfig
from cbsa_torch.train.errors import ConfigError


def build_model(config: TrainConfig, num_classes: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """The configured model and the constructor arguments that rebuild it."""
    settings = config.model
    if settings.init_from is not None:
        return _build_from_checkpoint(config, num_classes)
    known = timm.list_models()
    if settings.name not in known:
        suggestion = nearest(settings.name, registry.names()) or nearest(settings.name, known)
        raise ConfigError(f"no model {settings.name!r} in timm{suggestion}; `cbsa list` shows ours")
    try:
        args: dict[str, Any] = {
            k: yaml.safe_load(v) if isinstance(v, str) else v for k, v in settings.args.items()
        }
    except yaml.YAMLError as error:
        raise ConfigError(f"model.args are not values of YAML: {error}") from error
    if settings.image_size is not None:
        args["img_size"] = settings.image_size
    if num_classes is not None:
        args["num_classes"] = num_classes
    try:
        return timm.create_model(settings.name, **args), args
    except Exception as error:  # constructors of any model of timm, called with anything
        raise ConfigError(f"cannot build {settings.name} with {args}: {error}") from error


def _build_from_checkpoint(config: TrainConfig, num_classes: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """A trained model, with a new head and another image size where asked for."""
    settings = config.model
    source = settings.init_from
    if not source:
        raise ConfigError(
            "model.init_from is required here: a run's folder, a .safetensors file of ours, a released "
            f"checkpoint of the official code (.pth, .pth.tar), or {PREFIX}user/name"
        )
    # Only by its prefix: a mistyped folder must not fetch somebody's repository of that name.
    path = fetch_weights(source) if source.startswith(PREFIX) else weights_path(source)
    model, info = (read_official if path.suffix in PICKLE_SUFFIXES else load_checkpoint)(path)
    if info["model"] != settings.name:
        raise ConfigError(
            f"model.init_from {path} holds {info['model']!r}, but model.name is {settings.name!r}"
        )
    if settings.args:
        raise ConfigError("model.args cannot be changed together with model.init_from")
    args = dict(info["model_args"])
    if num_classes is not None and num_classes != args.get("num_classes"):
        model.reset_classifier(num_classes)  # type: ignore[operator]
        args["num_classes"] = num_classes
    if settings.image_size is not None:
        model.set_input_size(img_size=settings.image_size)  # type: ignore[operator]
        args["img_size"] = settings.image_size
    return model, args
