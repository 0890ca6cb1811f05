"""See the compression happen: capture, rates, attention maps, report. Imports neither models nor train."""

from cbsa_torch._core.optional import require

for _module in ("matplotlib", "jinja2"):
    require(_module, extra="interpret")

from cbsa_torch.interpret.attention_maps import (  # noqa: E402
    cls_attention_maps,
    overlay,
    receptive_fields,
    upsample_maps,
)
from cbsa_torch.interpret.capture import LayerRecord, capture  # noqa: E402
from cbsa_torch.interpret.image_pairs import ImagePairs, SegmentedImage, read_pairs, read_voc  # noqa: E402
from cbsa_torch.interpret.rates import LayerRates, coding_rates  # noqa: E402
from cbsa_torch.interpret.report import report  # noqa: E402
from cbsa_torch.interpret.zero_shot import ZeroShot, zero_shot_iou  # noqa: E402

__all__ = [
    "ImagePairs",
    "LayerRates",
    "LayerRecord",
    "SegmentedImage",
    "ZeroShot",
    "capture",
    "cls_attention_maps",
    "coding_rates",
    "overlay",
    "read_pairs",
    "read_voc",
    "receptive_fields",
    "report",
    "upsample_maps",
    "zero_shot_iou",
]
