"""Weights that the encoder of a segmenter starts from: timm's own, or those of a trained classifier."""

from __future__ import annotations

import dataclasses
from typing import Any

import timm
import yaml
from torch import Tensor, nn

from cbsa_torch.models.checkpoint import FETCHING_ARGS, check_fit
from cbsa_torch.train.build import open_source
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.tasks.segmentation.config import SegmentationTrainConfig

PRETRAINED = "pretrained"
"""Stands for the weights that timm has for an encoder."""
HEADS = ("head", "fc_norm", "attn_pool", "fc")
"""Parts of classifiers that no encoder has."""


def with_encoder(config: SegmentationTrainConfig) -> SegmentationTrainConfig:
    """The configuration with the encoder in ``model.args`` that ``model.encoder_from`` says it is.

    Raises:
        ConfigError: ``model.args`` name another encoder, or options that a trained one has already.
        CheckpointError: of the file.
    """
    source, args = config.model.encoder_from, config.model.args
    if source is None or source == PRETRAINED:
        return config
    _, info, path = open_source("model.encoder_from", source)
    if info["model"] == "segmenter":
        raise ConfigError(
            f"model.encoder_from must be a classifier, and {path} holds a segmenter: to start from all of it, "
            "use model.init_from"
        )
    for key, found in (("encoder", info["model"]), ("encoder_args", None)):
        if key in args and args[key] != found:
            raise ConfigError(
                f"model.args {key} must be left out beside model.encoder_from: {path} holds {info['model']!r}; "
                f"got {args[key]!r}"
            )
    own = {key: value for key, value in info["model_args"].items() if key != "num_classes"}
    # as YAML in one line, the form in which all arguments are kept
    encoder_args = yaml.safe_dump(own, default_flow_style=True, width=float("inf")).strip()
    chosen = {**args, "encoder": info["model"], "encoder_args": encoder_args}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, args=chosen))


def encoder_weights(config: SegmentationTrainConfig) -> dict[str, Tensor] | None:
    """The weights that ``model.encoder_from`` names; None if it names none."""
    source = config.model.encoder_from
    if source is None:
        return None
    if source != PRETRAINED:
        return open_source("model.encoder_from", source)[0].state_dict()
    args = {key: yaml.safe_load(str(value)) for key, value in config.model.args.items()}
    name, encoder_args = args.get("encoder", "vit_tiny_patch16_224"), args.get("encoder_args") or {}
    refused = sorted(FETCHING_ARGS & set(encoder_args))
    if refused:
        raise ConfigError(f"model.args encoder_args must not hold {refused[0]}")
    given = {"img_size": config.model.image_size, "in_chans": args.get("in_chans")}
    given = {key: value for key, value in given.items() if value is not None}
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0, **given, **encoder_args)
    except Exception as error:  # any model of timm, and the network
        raise ConfigError(f"model.encoder_from: timm has no weights for {name} here: {error}") from error
    return model.state_dict()


def load_encoder(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Copy weights into ``model.encoder``; all of the encoder must be there, and nothing beyond but a head.

    Raises:
        CheckpointError: names or shapes that do not fit.
    """
    encoder: Any = model.encoder
    own = encoder.state_dict()
    given = {name: value for name, value in weights.items() if name in own or name.split(".")[0] not in HEADS}
    check_fit(given, own, f"model.encoder_from {source}")
    encoder.load_state_dict(given)
