"""Recovery at once, or layer by layer from the last to the first, each stage a run of its own."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from cbsa_torch.models.adapt.find import select_layers
from cbsa_torch.models.adapt.vit import countable_layers
from cbsa_torch.train.config import check_config
from cbsa_torch.train.data import input_spec, open_splits
from cbsa_torch.train.engine.console import say
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.tasks.adaptation.task import AdaptTrainConfig, check_adaptation, knows, open_original
from cbsa_torch.train.trainer import TrainResult, train


def recover(config: AdaptTrainConfig, stage_epochs: int | None = None) -> TrainResult:
    """Adapt and fine-tune as configured, into ``config.output``; what is there already is continued.

    Args:
        config: of the recovery.
        stage_epochs: adapt layer by layer, from the last to the first, and train so long after each; the last
            stage adapts the first layer and trains for ``optim.epochs``. Its predecessors are the runs
            ``<output>_stages/1``, ``2`` and so on. Default: all layers at once.

    Raises:
        What :func:`cbsa_torch.train.train` raises.

    Examples:
        >>> from cbsa_torch.train import AdaptTrainConfig, AdaptedModelConfig, DataConfig, OptimConfig, recover
        >>> config = AdaptTrainConfig(
        ...     output="runs/adapted",
        ...     model=AdaptedModelConfig(original="vit.safetensors", args={"num_representatives": 4}),
        ...     data=DataConfig(root="photos", workers=0),
        ...     optim=OptimConfig("adamw", batch_size=12, epochs=1, warmup_epochs=0),
        ... )
        >>> recover(config).best_epoch
        classes: 3 (blue, green, red)
        ...
        best validation accuracy: ... in epoch 1
        1
    """
    runs = [config] if stage_epochs is None else stages(config, stage_epochs)
    for stage in runs:  # before the first is trained
        RunFolder(stage.output).check(stage)
    for number, stage in enumerate(runs, 1):
        if len(runs) > 1 and os.environ.get("RANK", "0") == "0":  # of several processes one speaks
            say(f"stage {number} of {len(runs)}: layers {stage.model.layers}")
        result = train(stage)
    return result


def stages(config: AdaptTrainConfig, epochs: int) -> list[AdaptTrainConfig]:
    """The configurations of a recovery layer by layer.

    Raises:
        ConfigError: nothing can be adapted, or the epochs are not positive.
    """
    if epochs < 1:
        raise ConfigError(f"stage_epochs must be at least 1, got {epochs}")
    if config.resume:
        raise ConfigError("resume is not for stages: without it, stages that were trained already are kept")
    check_config(config)
    check_adaptation(config)
    source, weights = str(config.model.original), config.model.weights
    original = open_original("model.original", source, weights=weights)
    found = countable_layers(original.model)
    try:
        asked = select_layers([layer.name for layer in found], config.model.layers_asked())
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model.{error}") from error
    indices = [i for i, layer in enumerate(found) if layer.name in asked and not layer.incompatibility]
    if not indices:
        raise ConfigError(f"model.original {source} has no layer that can be adapted")
    distill = config.distill
    if distill.wanted and distill.teacher is None:
        distill = dataclasses.replace(distill, teacher=source, teacher_weights=weights)
    # Later stages start from runs of this one, whose head is for the data's classes already.
    tune_head = config.tune_head
    if config.tune != "all" and not tune_head:
        tune_head = not knows(original, open_splits(config.data, input_spec(original.model).mode).class_names)
    result: list[AdaptTrainConfig] = []
    for number in range(1, len(indices) + 1):
        last = number == len(indices)
        layers = ",".join(map(str, indices[-number:]))
        optim = config.optim
        if not last:
            optim = dataclasses.replace(optim, epochs=epochs, warmup_epochs=min(optim.warmup_epochs, epochs))
        result.append(
            dataclasses.replace(
                config,
                output=config.output if last else f"{Path(config.output)}_stages/{number}",
                model=dataclasses.replace(config.model, original=source, weights=weights, layers=layers),
                optim=optim,
                distill=distill,
                tune_head=tune_head,
            )
        )
        source, weights = result[-1].output, None
    return result
