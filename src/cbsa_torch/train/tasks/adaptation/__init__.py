"""Recovery of adapted ViTs: fine-tune after :func:`cbsa_torch.models.adapt_vit`, with or without a teacher."""

from cbsa_torch.train.tasks.adaptation.config import AdaptedModelConfig, AdaptTrainConfig, DistillConfig
from cbsa_torch.train.tasks.adaptation.original import Original, adapt_original, open_original
from cbsa_torch.train.tasks.adaptation.stages import recover

__all__ = [
    "AdaptTrainConfig",
    "AdaptedModelConfig",
    "DistillConfig",
    "Original",
    "adapt_original",
    "open_original",
    "recover",
]
