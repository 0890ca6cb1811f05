"""Adapt pretrained ViTs: other attention on the weights they have (paper, section 4.2)."""

from cbsa_torch.models.adapt.factory import adapted_vit
from cbsa_torch.models.adapt.registration import register_transformers
from cbsa_torch.models.adapt.report import AdaptReport, LayerReport
from cbsa_torch.models.adapt.vit import AdaptedModel, adapt_vit

__all__ = ["AdaptReport", "AdaptedModel", "LayerReport", "adapt_vit", "adapted_vit", "register_transformers"]
