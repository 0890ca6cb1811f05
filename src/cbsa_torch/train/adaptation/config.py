"""Settings of a recovery: what is adapted, to which attention, what is trained, what is distilled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from cbsa_torch.models.adapt.vit import MixerName
from cbsa_torch.train.config import ModelConfig, OptimConfig, TrainConfig
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.values import check_rules

ENTRY = "adapted_vit"


@dataclass
class AdaptedModelConfig(ModelConfig):
    """What is adapted; args are options of the mixer, e.g. num_representatives 36 contraction_step 1."""

    name: str = ENTRY
    """The model of timm that rebuilds an adapted one."""
    original: str | None = None
    """The ViT that is adapted: a run's folder, a .safetensors file of ours, hf-hub:owner/name, or the name of a
    timm model, whose pretrained weights are fetched. An adapted one gets more layers adapted."""
    mixer: MixerName = "adapted_cbsa"
    """The attention that it gets; docs/adapt.md has a table."""
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


@dataclass
class DistillConfig:
    """What the adapted model learns from the original besides the labels. The loss is the weighted sum."""

    labels: float = 1.0
    """Weight of the cross-entropy against the labels; 0: only the teacher counts."""
    logits: float = 0.0
    """Weight of the Kullback-Leibler divergence from the teacher's classes, times temperature squared."""
    temperature: float = 2.0
    """Logits of both are divided by it."""
    features: float = 0.0
    """Weight of the difference after every block with attention: its square over that of the teacher's
    features, mean over the images and the blocks."""
    teacher: str | None = None
    """As model.original. Default: that."""

    @property
    def wanted(self) -> bool:
        """Whether a teacher is needed."""
        return self.logits > 0 or self.features > 0


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
    """Adapt a pretrained ViT and recover its accuracy."""

    task: ClassVar[str] = "adaptation"
    """Its name."""
    output: str = "runs/adapted"
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
        (new_lr is None or new_lr > 0, "new_lr must be positive", new_lr),
        (
            not (config.engine.compile and distill.features > 0),
            "engine.compile must be off with distill.features (blocks are looked into)",
            config.engine.compile,
        ),
    ])  # fmt: skip
    model.layers_asked()
