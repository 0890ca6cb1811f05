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
from cbsa_torch.interpret.foreground import ForegroundImages, SegmentedImage, read_pairs, read_voc  # noqa: E402
from cbsa_torch.interpret.rates import (  # noqa: E402
    ImageRates,
    LayerRates,
    Rates,
    ReducedRates,
    coding_rates,
    image_rates,
    measure_rates,
    reduced_rates,
)
from cbsa_torch.interpret.report import ComparedRun, Pictures, compare, report  # noqa: E402
from cbsa_torch.interpret.robustness import Robustness, parameter_noise, robustness  # noqa: E402
from cbsa_torch.interpret.structure import (  # noqa: E402
    AttentionRanks,
    Sparsity,
    attention_ranks,
    ista_sparsity,
    subspace_coherence,
)
from cbsa_torch.interpret.zero_shot import ZeroShot, zero_shot_iou  # noqa: E402

__all__ = [
    "AttentionRanks",
    "ComparedRun",
    "ForegroundImages",
    "ImageRates",
    "LayerRates",
    "LayerRecord",
    "Pictures",
    "Rates",
    "ReducedRates",
    "Robustness",
    "SegmentedImage",
    "Sparsity",
    "ZeroShot",
    "attention_ranks",
    "capture",
    "cls_attention_maps",
    "coding_rates",
    "compare",
    "image_rates",
    "ista_sparsity",
    "measure_rates",
    "overlay",
    "parameter_noise",
    "read_pairs",
    "read_voc",
    "receptive_fields",
    "reduced_rates",
    "report",
    "robustness",
    "subspace_coherence",
    "upsample_maps",
    "zero_shot_iou",
]
