"""Look into models: what each layer does to the coding rate, and where it looks. Works on any module tree.

- Records: :func:`capture` (a :class:`LayerRecord` for each attention layer and forward pass).
- Coding rates, Fig. 5 and 6: :func:`measure_rates` (:class:`Rates`), or :func:`coding_rates`
  (:class:`LayerRates`) and :func:`reduced_rates` (:class:`ReducedRates`) alone; of every image
  :func:`image_rates` (:class:`ImageRates`).
- What certified steps guarantee, and whether they kept it: :func:`certificate` (:class:`Certificate`,
  :class:`LayerCertificate`).
- Structure: :func:`subspace_coherence`, :func:`attention_ranks` (:class:`AttentionRanks`),
  :func:`ista_sparsity` (:class:`Sparsity`).
- Attention maps, Fig. 7: :func:`cls_attention_maps`, :func:`receptive_fields`, :func:`upsample_maps`,
  :func:`overlay`; of tokens without a grid :func:`token_attention`, :func:`coordinate_map`.
- Robustness, Fig. 8: :func:`robustness` (:class:`Robustness`), :func:`noisy_copy`.
- Zero-shot segmentation, Tables 5 and 6: :func:`zero_shot_iou` (:class:`ZeroShot`), of images with masks
  that :func:`read_pairs` and :func:`read_voc` read (:class:`ForegroundImages`, :class:`SegmentedImage`).
- Pages: :func:`report`, :func:`compare` (:class:`ComparedRun`), :class:`Pictures`.

The numbers in names of figures and tables are the paper's. Records, rates, structure, maps and robustness need
torch alone; overlays, zero-shot segmentation and pages need the extra ``interpret``, at their first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from cbsa_torch._core.optional import require
from cbsa_torch.interpret.attention_maps import (
    cls_attention_maps,
    receptive_fields,
    token_attention,
    upsample_maps,
)
from cbsa_torch.interpret.capture import LayerRecord, capture
from cbsa_torch.interpret.certificate import Certificate, LayerCertificate
from cbsa_torch.interpret.certify import certificate
from cbsa_torch.interpret.rates import (
    ImageRates,
    LayerRates,
    Rates,
    ReducedRates,
    coding_rates,
    image_rates,
    measure_rates,
    reduced_rates,
)
from cbsa_torch.interpret.robustness import Robustness, noisy_copy, robustness
from cbsa_torch.interpret.structure import (
    AttentionRanks,
    Sparsity,
    attention_ranks,
    ista_sparsity,
    subspace_coherence,
)

if TYPE_CHECKING:
    from cbsa_torch.interpret.foreground import ForegroundImages, SegmentedImage, read_pairs, read_voc
    from cbsa_torch.interpret.pages.compare import ComparedRun, compare
    from cbsa_torch.interpret.pages.maps import Pictures
    from cbsa_torch.interpret.pages.report import report
    from cbsa_torch.interpret.plots import overlay
    from cbsa_torch.interpret.tile_maps import coordinate_map
    from cbsa_torch.interpret.zero_shot import ZeroShot, zero_shot_iou

__all__ = [
    "AttentionRanks",
    "Certificate",
    "ComparedRun",
    "ForegroundImages",
    "ImageRates",
    "LayerCertificate",
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
    "certificate",
    "cls_attention_maps",
    "coding_rates",
    "compare",
    "coordinate_map",
    "image_rates",
    "ista_sparsity",
    "measure_rates",
    "noisy_copy",
    "overlay",
    "read_pairs",
    "read_voc",
    "receptive_fields",
    "reduced_rates",
    "report",
    "robustness",
    "subspace_coherence",
    "token_attention",
    "upsample_maps",
    "zero_shot_iou",
]

_NEED_EXTRA = ("foreground", "plots", "tile_maps", "zero_shot", "pages.maps", "pages.report", "pages.compare")
"""Modules whose names in ``__all__`` are imported at first use."""

if not TYPE_CHECKING:  # so that a checker of types reports names that do not exist

    def __getattr__(name: str) -> Any:
        if name in __all__:
            require("interpret")
            for module in (importlib.import_module(f"cbsa_torch.interpret.{module}") for module in _NEED_EXTRA):
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module 'cbsa_torch.interpret' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
