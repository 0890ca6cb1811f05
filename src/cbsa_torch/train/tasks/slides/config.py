"""Settings of slides: where features and labels are, how slides are split, what a training step sees."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from cbsa_torch.train.config import (
    LOCAL,
    UNCOMPARED,
    DataSource,
    ModelConfig,
    RunConfig,
    check_rules,
    data_rules,
)


@dataclass
class SlidesDataConfig(DataSource):
    """The files of features, and the table that says which slides there are and what their labels are."""

    name: str = "slides"
    """What the data set is called in messages, on cards and pages."""
    root: str | None = field(default=None, metadata=LOCAL)
    """Folder of the feature files, one per slide: SLIDE.h5, as TRIDENT and CLAM write them, or SLIDE.pt."""
    csv: str | None = field(default=None, metadata=LOCAL)
    """Table of slides with a heading. Default: slides.csv in data.root."""
    slide_column: str = "slide"
    """Its column of file names, with or without .h5 or .pt."""
    label_column: str = "label"
    """Its column of classes, any text."""
    patient_column: str | None = None
    """Its column of patients, who are in one split with all of their slides. Default: "patient", if there is
    such a column, else every slide is a patient of its own."""
    split_column: str | None = None
    """Its column of splits: train, val or test. Default: "split", if there is such a column, else splits are
    drawn by patient, stratified by label, with the run's seed."""
    val_fraction: float = 0.15
    """Share of the patients held out for validation, where no column of splits has val; of the others than the
    test split's."""
    test_fraction: float = 0.2
    """Share of the patients held out for the test split, where there is no column of splits; 0: none."""
    coords: bool = True
    """Whether the model is given the coordinates of the tiles. false: for a model that needs none
    (model.args positions none representatives learned)."""
    max_tiles: int | None = None
    """Random tiles of a slide that a training step sees, drawn anew in every epoch. Default: all."""
    class_weights: Literal["balanced", "none"] = "balanced"
    """Weights of slides in the loss: "balanced" = inversely proportional to the training slides of their class,
    1 on average."""
    workers: int = field(default=0, metadata=LOCAL | UNCOMPARED)
    """Processes that read slides; 0: the training process itself."""


@dataclass
class SlidesModelConfig(ModelConfig):
    """The model of sets of features."""

    name: str = "token_set_cbt_small"
    """A token_set_... model; `cbsa list` shows them. The width of the features (in_dim) is read from the
    files."""


@dataclass(kw_only=True)
class SlidesTrainConfig(RunConfig):
    """Train a classifier of whole slides."""

    task: ClassVar[str] = "slides"
    """Its name."""
    model: SlidesModelConfig = field(default_factory=SlidesModelConfig)
    data: SlidesDataConfig = field(default_factory=SlidesDataConfig)


def check_slide_settings(config: SlidesTrainConfig) -> None:
    """Refuse values that cannot work; raises ConfigError."""
    data, model, engine = config.data, config.model, config.engine
    check_rules([
        *data_rules(data),
        (0 <= data.test_fraction < 1, "data.test_fraction must be in [0, 1)", data.test_fraction),
        (data.max_tiles is None or data.max_tiles >= 1, "data.max_tiles must be at least 1", data.max_tiles),
        (model.image_size is None, "model.image_size must be left out (slides are features)", model.image_size),
        (
            engine.context_parallel == 1 or not engine.compile,
            "engine.compile must be off with engine.context_parallel: every size of slide is compiled anew",
            engine.compile,
        ),
    ])  # fmt: skip
