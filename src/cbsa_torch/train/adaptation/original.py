"""The model that is adapted: where it comes from, and what it becomes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import timm
import yaml
from torch import nn

from cbsa_torch._core.checks import nearest
from cbsa_torch.models.adapt.find import find_attention, select_layers
from cbsa_torch.models.adapt.report import AdaptReport
from cbsa_torch.models.adapt.vit import adapt_vit
from cbsa_torch.models.hub import PREFIX
from cbsa_torch.nn import TokenMixer
from cbsa_torch.train.adaptation.config import ENTRY, AdaptedModelConfig
from cbsa_torch.train.build import open_source
from cbsa_torch.train.errors import ConfigError


class Original(NamedTuple):
    """A trained classifier."""

    model: nn.Module
    name: str
    """Of timm."""
    args: dict[str, Any]
    """Constructor arguments that rebuild it."""
    class_names: list[str] | None
    """In the order of its outputs, where it says."""


def open_original(key: str, source: str, image_size: int | None = None) -> Original:
    """A run's model, a file of ours, or one of timm with its pretrained weights.

    Args:
        key: of the configuration, for errors.
        source: what it was set to.
        image_size: side that it is set to. Default: its own.

    Raises:
        ConfigError: nothing of that name, or no classifier. CheckpointError, OSError: of the file.
    """
    if source.startswith(PREFIX) or Path(source).exists():
        model, info, path = open_source(key, source)
        original = Original(model, info["model"], dict(info["model_args"]), info.get("class_names"))
        if original.name == "segmenter":
            raise ConfigError(f"{key} must be a classifier, and {path} holds a segmenter")
    else:
        original = _of_timm(key, source)
    if image_size is not None:
        resize: Any = getattr(original.model, "set_input_size", None)
        if resize is None:
            raise ConfigError(f"model.image_size: {original.name} cannot be given another size")
        resize(img_size=image_size)
        original = original._replace(args={**original.args, "img_size": image_size})
    return original


def _of_timm(key: str, source: str) -> Original:
    if not timm.is_model(source):
        raise ConfigError(
            f"{key}: {source!r} is neither a run's folder or file nor a model of timm"
            f"{nearest(source, timm.list_models())}"
        )
    if source.partition(".")[0] == ENTRY:
        raise ConfigError(f"{key} must be a trained model; {ENTRY} is the entry that rebuilds adapted ones")
    try:
        model = timm.create_model(source, pretrained=True)
    except Exception as error:  # any model of timm, and the network
        raise ConfigError(f"{key}: timm has no weights for {source} here: {error}") from error
    return Original(model, source, {"num_classes": getattr(model, "num_classes", None)}, None)


class Adapted(NamedTuple):
    """A copy of an original with other attention."""

    model: nn.Module
    args: dict[str, Any]
    """Arguments of ``adapted_vit`` that rebuild it."""
    report: AdaptReport
    new: tuple[str, ...]
    """Parameters that adaptation added, by name."""
    layers: tuple[str, ...]
    """Attention layers that are adapted now."""


def adapt_original(original: Original, settings: AdaptedModelConfig) -> Adapted:
    """Adapt a copy. An original that is adapted already, in the same way, gets more layers adapted.

    Raises:
        ConfigError: what :func:`cbsa_torch.models.adapt_vit` refuses, or an original adapted in another way.
    """
    try:
        options = {key: yaml.safe_load(str(value)) for key, value in settings.args.items()}
    except yaml.YAMLError as error:
        raise ConfigError(f"model.args are not values of YAML: {error}") from error
    layers: Any = settings.layers_asked()
    try:
        if original.name == ENTRY:
            return _extend(original, settings.mixer, options, layers)
        model, report = adapt_vit(original.model, settings.mixer, layers=layers, **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model.original {settings.original} cannot be adapted: {error}") from error
    args = report.model_args(original.name, **original.args)
    return Adapted(model, args, report, *_added(model))


def _extend(original: Original, mixer: str, options: dict[str, Any], layers: Any) -> Adapted:
    """Adapt layers of an adapted model that are not yet."""
    args = original.args
    before = {"mixer": args.get("mixer", "adapted_cbsa"), "mixer_args": args.get("mixer_args") or {}}
    if before != {"mixer": mixer, "mixer_args": options}:
        raise ValueError(
            f"it is adapted already, to {before['mixer']!r} with {before['mixer_args']}; more layers can "
            f"only be adapted likewise, got {mixer!r} with {options}"
        )
    found = [layer for layer in find_attention(original.model) if not layer.is_pool]
    asked = select_layers(found, layers)
    done = [i for i, layer in enumerate(found) if isinstance(layer.module, TokenMixer)]
    left = [i for i, layer in enumerate(found) if layer.name in asked and i not in done]
    if not left:
        raise ValueError("all layers that model.layers asks for are adapted already")
    model, report = adapt_vit(original.model, mixer, layers=left, **options)  # type: ignore[arg-type]
    return Adapted(model, {**copy.deepcopy(args), "layers": sorted(done + left)}, report, *_added(model))


def _added(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is new in a model's adapted layers, and the layers."""
    layers = [layer.name for layer in find_attention(model) if isinstance(layer.module, TokenMixer)]
    new = [
        f"{layer}.{name}"
        for layer in layers
        for name, _ in model.get_submodule(layer).named_parameters()
        # steps and temperatures are the layer's own; everything else is in a part that it inherited
        if "." not in name and (name.startswith("step") or name == "temperature")
    ]
    return tuple(new), tuple(layers)
