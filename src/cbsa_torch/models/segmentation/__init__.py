"""Semantic segmentation: CBT's decoder and its relatives on encoders of timm, and inference by windows."""

from cbsa_torch.models.segmentation.decoder import MaskTransformerDecoder
from cbsa_torch.models.segmentation.factory import segmenter
from cbsa_torch.models.segmentation.model import Segmenter
from cbsa_torch.models.segmentation.sliding import multi_scale_logits, sliding_logits

__all__ = ["MaskTransformerDecoder", "Segmenter", "multi_scale_logits", "segmenter", "sliding_logits"]
