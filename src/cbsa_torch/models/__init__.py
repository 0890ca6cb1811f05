"""Models registered with timm. Importing this package makes ``timm.create_model("cbt_...")`` work."""

from cbsa_torch._core.optional import require

require("models")

import cbsa_torch.ops.cbsa.flops  # noqa: E402, F401  (lets torch count the operations of our operators)
from cbsa_torch.models import registry, token_set_registry  # noqa: E402, F401  (register the models)
from cbsa_torch.models.adapt import AdaptedModel, AdaptReport, adapt_vit, register_transformers  # noqa: E402
from cbsa_torch.models.checkpoint import load_checkpoint, read_tensors, save_checkpoint  # noqa: E402
from cbsa_torch.models.convert import load_official  # noqa: E402
from cbsa_torch.models.export import ExportError, ExportReport, export_model, with_fixed_grid  # noqa: E402
from cbsa_torch.models.hub import from_pretrained  # noqa: E402
from cbsa_torch.models.segmentation import (  # noqa: E402
    MaskTransformerDecoder,
    Segmenter,
    multi_scale_logits,
    segmenter,
    sliding_logits,
)
from cbsa_torch.models.slide_encoder import SlideEncoder  # noqa: E402
from cbsa_torch.models.token_set import TokenSetTransformer  # noqa: E402
from cbsa_torch.models.whitebox import WhiteBoxTransformer  # noqa: E402

__all__ = [
    "AdaptReport",
    "AdaptedModel",
    "ExportError",
    "ExportReport",
    "MaskTransformerDecoder",
    "Segmenter",
    "SlideEncoder",
    "TokenSetTransformer",
    "WhiteBoxTransformer",
    "adapt_vit",
    "export_model",
    "from_pretrained",
    "load_checkpoint",
    "load_official",
    "multi_scale_logits",
    "read_tensors",
    "register_transformers",
    "registry",
    "save_checkpoint",
    "segmenter",
    "sliding_logits",
    "with_fixed_grid",
]
