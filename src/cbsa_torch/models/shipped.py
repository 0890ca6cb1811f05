"""Trained weights that come with the package: each is a tag of timm's, named after its form and its data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).with_name("weights")
WEIGHTS = "model.safetensors"
"""The file of weights in the folder of a run."""


class Shipped(NamedTuple):
    """Weights, and the model that they are of."""

    architecture: str
    """Name in timm, without the tag."""
    tag: str
    form: Mapping[str, Any]
    """Arguments of the model, other than their defaults, that the weights were trained with."""
    class_names: tuple[str, ...]
    description: str

    @property
    def name(self) -> str:
        """``ARCHITECTURE.TAG``, the name in timm."""
        return f"{self.architecture}.{self.tag}"

    @property
    def folder(self) -> Path:
        """The record of the run that trained them: weights, curve, environment, evaluation."""
        return FOLDER / self.name

    def timm_config(self) -> dict[str, Any]:
        """What timm's configuration says of the weights, beside that of the architecture."""
        return {
            "file": str(self.folder / WEIGHTS),
            "num_classes": len(self.class_names),
            "label_names": self.class_names,
            "description": self.description,
        }


SHIPPED = {
    weights.name: weights
    for weights in (
        Shipped(
            "cbt_pico_patch1_8",
            "certified_digits",
            {"step": "certified"},
            tuple("0123456789"),
            "CBSA with certified steps, trained on scikit-learn's digits (1,257 scans of 8x8 pixels)",
        ),
    )
}
"""By their names in timm."""


def results_folder(weights: Path) -> Path:
    """Where reports and evaluations of weights go: beside them, or ``runs/NAME`` for those of the package."""
    folder = weights.parent
    return Path("runs") / folder.name if folder.parent == FOLDER else folder
