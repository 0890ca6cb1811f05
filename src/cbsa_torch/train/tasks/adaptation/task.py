"""The task of recovering an adapted classifier: classification with a model of two origins."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import timm
from torch import nn

from cbsa_torch._core.checks import nearest
from cbsa_torch.models.adapt.factory import adapted_vit
from cbsa_torch.models.adapt.find import find_attention, select_layers
from cbsa_torch.models.adapt.report import AdaptReport
from cbsa_torch.models.adapt.vit import MixerName, adapt_vit, countable_layers
from cbsa_torch.models.hub import PREFIX
from cbsa_torch.nn import TokenMixer
from cbsa_torch.train.build import Built, fit, open_source
from cbsa_torch.train.config import (
    LOCAL,
    UNCOMPARED,
    WEIGHTS,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    check_rules,
)
from cbsa_torch.train.data import describe, input_spec
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.losses import Distillation, DistillConfig, Loss
from cbsa_torch.train.tasks.base import TaskSetup
from cbsa_torch.train.tasks.classification import Classification

ENTRY = "adapted_vit"
"""The model of timm that rebuilds adapted ones."""


@dataclass
class AdaptedModelConfig(ModelConfig):
    """What is adapted; args are options of the mixer, e.g. num_representatives 36 contraction_step 1.

    Examples:
        >>> from cbsa_torch.train import AdaptedModelConfig
        >>> AdaptedModelConfig(original="vit_small_patch16_224", layers="9,10,-1").layers_asked()
        [9, 10, -1]
    """

    name: str = ENTRY
    """The model of timm that rebuilds an adapted one."""
    original: str | None = field(default=None, metadata=WEIGHTS)
    """The ViT that is adapted: a run's folder, a .safetensors file of ours, hf-hub:owner/name, or the name of a
    timm model, whose pretrained weights are fetched unless `weights` are given. An adapted one gets more layers
    adapted."""
    weights: str | None = field(default=None, metadata=WEIGHTS)
    """File of weights of the timm model that `original` names, instead of timm's pretrained ones: a plain state
    dict with the names of timm, transformers, torchvision or the DINO hubs."""
    mixer: MixerName = "adapted_cbsa"
    """The attention that it gets; docs/reference/adaptation.md has a table."""
    layers: str = "all"
    """"all", "latter_half", or indices of attention layers with commas between, e.g. "9,10,-1"."""

    def layers_asked(self) -> str | list[int]:
        """As :func:`cbsa_torch.models.adapt_vit` takes them; raises ConfigError."""
        if not any(character.isdigit() for character in self.layers):
            return self.layers
        try:
            return [int(part) for part in self.layers.split(",")]
        except ValueError:
            raise ConfigError(
                f'model.layers must be "all", "latter_half" or indices with commas between, got {self.layers!r}'
            ) from None


def paper_optimiser() -> OptimConfig:
    """Section 4.2: AdamW, learning rate 5e-5, weight decay 0.01, batches of 512, 50 epochs."""
    return OptimConfig(
        name="adamw",
        lr=5e-5,
        weight_decay=0.01,
        batch_size=512,
        epochs=50,
        warmup_epochs=0,
        label_smoothing=0.0,
    )


@dataclass(kw_only=True)
class AdaptTrainConfig(TrainConfig):
    """Adapt a pretrained ViT and recover its accuracy.

    Examples:
        >>> from cbsa_torch.train import AdaptedModelConfig, AdaptTrainConfig
        >>> model = AdaptedModelConfig(original="vit_small_patch16_224")
        >>> config = AdaptTrainConfig(model=model, tune="attention")
        >>> config.new_lr, config.distill.wanted
        (0.01, False)
    """

    task: ClassVar[str] = "adaptation"
    """Its name."""
    output: str = field(default="runs/adapted", metadata=LOCAL | UNCOMPARED)
    """The run's folder."""
    model: AdaptedModelConfig = field(default_factory=AdaptedModelConfig)
    optim: OptimConfig = field(default_factory=paper_optimiser)
    distill: DistillConfig = field(default_factory=DistillConfig)
    tune: Literal["all", "attention", "new"] = "all"
    """What is trained: everything; the adapted layers; or what they have that the original has not. With new
    classes the head is trained, too."""
    tune_head: bool = False
    """Also train the head where `tune` leaves the rest as it was."""
    new_lr: float | None = 1e-2
    """Peak learning rate of what adaptation added, one number per head each, which the paper's rate would
    hardly move. None: optim.lr."""


def check_adaptation(config: AdaptTrainConfig) -> None:
    """Refuse what cannot work; raises ConfigError."""
    model, distill, new_lr = config.model, config.distill, config.new_lr
    check_rules([
        (model.name == ENTRY, f"model.name must be {ENTRY!r} for adaptation", repr(model.name)),
        (model.init_from is None, "model.init_from must be left out, model.original is set", model.init_from),
        (bool(model.original), "model.original must name a trained ViT", model.original),
        (distill.labels >= 0, "distill.labels must not be negative", distill.labels),
        (distill.logits >= 0, "distill.logits must not be negative", distill.logits),
        (distill.features >= 0, "distill.features must not be negative", distill.features),
        (distill.temperature > 0, "distill.temperature must be positive", distill.temperature),
        (
            distill.labels > 0 or distill.wanted,
            "distill must weigh something: labels, logits or features",
            "zero for all",
        ),
        (
            distill.teacher is None or distill.wanted,
            "distill.teacher needs distill.logits or distill.features above 0",
            distill.teacher,
        ),
        (
            distill.teacher_weights is None or distill.teacher is not None,
            "distill.teacher_weights needs distill.teacher, the name of the model in timm",
            distill.teacher_weights,
        ),
        (new_lr is None or new_lr > 0, "new_lr must be positive", new_lr),
        (
            not (config.engine.compile and distill.features > 0),
            "engine.compile must be off with distill.features (blocks are looked into)",
            config.engine.compile,
        ),
    ])  # fmt: skip
    model.layers_asked()


class Adaptation(Classification):
    """One class for every image, by a ViT whose attention is replaced."""

    config: AdaptTrainConfig

    def check(self) -> None:
        """Refuse settings of data, model and distillation that cannot work."""
        super().check()
        check_adaptation(self.config)

    def open(self, skipped: Path, *, continued: bool) -> TaskSetup:
        """The data, the adapted model, and the loss with its teacher."""
        config = self.config
        asked = config.model
        original = open_original("model.original", str(asked.original), asked.image_size, asked.weights)
        splits = self.open_data(input_spec(original.model).mode, skipped)
        adapted = adapt_original(original, config.model)
        new_head = not knows(original, splits.class_names)
        notes = [*describe(splits), *original.notes]
        if new_head:
            model: Any = adapted.model
            notes.append(f"new head for {len(splits.class_names)} classes (the weights have others or none)")
            model.reset_classifier(len(splits.class_names))
            adapted.args["num_classes"] = len(splits.class_names)
        loss = _distillation(config, original, adapted, splits.class_names)
        _freeze(config.tune, adapted, head=new_head or config.tune_head)
        spec = input_spec(adapted.model, config.model.image_size)
        scale = 1.0 if config.new_lr is None else config.new_lr / config.optim.lr
        scales = {} if scale == 1 else dict.fromkeys(_added(adapted.model), scale)
        data = splits.class_names, spec, splits.train, splits.val
        return TaskSetup(adapted.model, adapted.args, *data, loss, scales, [*notes, str(adapted.report)])


class Original(NamedTuple):
    """A trained classifier."""

    model: nn.Module
    name: str
    """The model's name in timm."""
    args: dict[str, Any]
    """Constructor arguments that rebuild it."""
    class_names: list[str] | None
    """In the order of its outputs, where it says."""
    notes: tuple[str, ...] = ()
    """How weights of others were read, and whether positions were resampled."""


def open_original(key: str, source: str, image_size: int | None = None, weights: str | None = None) -> Original:
    """A run's model, a file of ours, or one of timm with its pretrained weights or with given ones.

    Args:
        key: of the configuration, for errors.
        source: what it was set to.
        image_size: side that it is set to. Default: its own.
        weights: file with the weights of the timm model ``source``. Default: timm's pretrained ones.

    Raises:
        ConfigError: nothing of that name, or no classifier. CheckpointError, OSError: of the file.
    """
    names_file = source.startswith(PREFIX) or Path(source).exists()
    if names_file and weights is not None:
        raise ConfigError(f"{key} must be a name of timm beside weights {weights}; {source} has its own")
    if names_file or weights is not None:
        name = None if weights is None else _check_name(key, source)
        model, info, path = open_source(f"{key} {source}" if name else key, weights or source, name)
        class_names, notes = info.get("class_names"), tuple(info.get("notes", ()))
        original = Original(model, info["model"], dict(info["model_args"]), class_names, notes)
        if original.name == "segmenter":
            raise ConfigError(f"{key} must be a classifier, and {path} holds a segmenter")
    else:
        original = _of_timm(key, source)
    fitted = fit(Built(original.model, original.args, original.notes), None, image_size)
    return original._replace(args=fitted.args, notes=fitted.notes)


def _check_name(key: str, source: str) -> str:
    """The name of a trained model in timm."""
    if not timm.is_model(source):
        raise ConfigError(
            f"{key}: {source!r} is neither a run's folder or file nor a model of timm"
            f"{nearest(source, timm.list_models())}"
        )
    if source.partition(".")[0] == ENTRY:
        raise ConfigError(f"{key} must be a trained model; {ENTRY} is the entry that rebuilds adapted ones")
    return source


def _of_timm(key: str, source: str) -> Original:
    """One of timm's models with its pretrained weights."""
    try:
        model = timm.create_model(_check_name(key, source), pretrained=True)
    except ConfigError:
        raise
    except Exception as error:  # any model of timm, and the network
        raise ConfigError(
            f"{key}: timm has no weights for {source} here; a file of them is given by model.weights: {error}"
        ) from error
    return Original(model, source, {"num_classes": getattr(model, "num_classes", None)}, None)


class Adapted(NamedTuple):
    """A copy of an original with other attention."""

    model: nn.Module
    args: dict[str, Any]
    """Arguments of ``adapted_vit`` that rebuild it."""
    report: AdaptReport


def adapt_original(original: Original, model_config: AdaptedModelConfig) -> Adapted:
    """Adapt a copy. An original that is adapted already, in the same way, gets more layers adapted.

    Raises:
        ConfigError: what :func:`cbsa_torch.models.adapt_vit` refuses, or an original adapted in another way.
    """
    options = model_config.args
    layers: Any = model_config.layers_asked()
    try:
        if original.name == ENTRY:
            return _extend(original, model_config.mixer, options, layers)
        model, report = adapt_vit(original.model, model_config.mixer, layers=layers, **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model.original {model_config.original} cannot be adapted: {error}") from error
    args = report.model_args(original.name, **original.args)
    return Adapted(model, args, report)


def _extend(original: Original, mixer: str, options: dict[str, Any], layers: Any) -> Adapted:
    """Adapt layers of an adapted model that are not yet."""
    args = original.args
    before = {
        "mixer": args.get("mixer", inspect.signature(adapted_vit).parameters["mixer"].default),
        "mixer_args": args.get("mixer_args") or {},
    }
    if before != {"mixer": mixer, "mixer_args": options}:
        raise ValueError(
            f"it is adapted already, to {before['mixer']!r} with {before['mixer_args']}; more layers can "
            f"only be adapted likewise, got {mixer!r} with {options}"
        )
    found = countable_layers(original.model)
    asked = select_layers([layer.name for layer in found], layers)
    done = [i for i, layer in enumerate(found) if isinstance(layer.module, TokenMixer)]
    left = [i for i, layer in enumerate(found) if layer.name in asked and i not in done]
    if not left:
        raise ValueError("all layers that model.layers asks for are adapted already")
    model, report = adapt_vit(original.model, mixer, layers=left, **options)  # type: ignore[arg-type]
    return Adapted(model, {**copy.deepcopy(args), "layers": sorted(done + left)}, report)


def _adapted_layers(model: nn.Module) -> list[str]:
    """Names of the attention layers that are adapted."""
    return [layer.name for layer in find_attention(model) if isinstance(layer.module, TokenMixer)]


def _added(model: nn.Module) -> list[str]:
    """Names of the parameters that adaptation added."""
    return [
        f"{layer}.{name}"
        for layer in _adapted_layers(model)
        for name in model.get_submodule(layer).step_names()  # type: ignore[operator]  # all else is inherited
    ]


def knows(original: Original, class_names: list[str]) -> bool:
    """Whether it was trained on these classes, as far as it says."""
    count = getattr(original.model, "num_classes", None)
    return count == len(class_names) and original.class_names in (None, class_names)


def _distillation(
    config: AdaptTrainConfig, original: Original, adapted: Adapted, class_names: list[str]
) -> Loss | None:
    """The loss with a teacher; None if none is wanted."""
    distill = config.distill
    if not distill.wanted:
        return None
    teacher, key = original, "model.original"
    if distill.teacher is not None:
        key = "distill.teacher"
        teacher = open_original(key, distill.teacher, config.model.image_size, distill.teacher_weights)
    if distill.logits and not knows(teacher, class_names):
        raise ConfigError(
            f"distill.logits needs a teacher of the same classes: {key} was trained on others than the data "
            "have; distill.features works"
        )
    try:
        loss = Distillation(
            adapted.model, teacher.model, distill, config.optim.label_smoothing, config.engine.precision
        )
        loss.check(adapted.model, input_spec(adapted.model, config.model.image_size).input_size)
    except (AttributeError, ValueError) as error:
        raise ConfigError(f"distill.teacher must be built as the original is: {error}") from None
    return loss


def _freeze(tune: str, adapted: Adapted, *, head: bool) -> None:
    """Leave only what is to be trained with gradients."""
    if tune == "all":
        return
    model: Any = adapted.model
    model.requires_grad_(False)
    if tune == "attention":
        for layer in _adapted_layers(model):
            model.get_submodule(layer).requires_grad_(True)
    else:
        for name in _added(model):
            model.get_parameter(name).requires_grad_(True)
    if head:
        classifiers = model.get_classifier()  # two of a distilled DeiT
        for classifier in classifiers if isinstance(classifiers, tuple) else (classifiers,):
            classifier.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"tune {tune!r} leaves nothing to train: {adapted.report.mixer!r} adds no parameters here; "
            'use "attention" or "all"'
        )
