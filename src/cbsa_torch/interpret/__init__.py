"""See the compression happen: capture, rates, attention maps, report. Imports neither models nor train."""

from cbsa_torch._core.optional import require

for _module in ("matplotlib", "jinja2"):
    require(_module, extra="interpret")

from cbsa_torch.interpret.attention_maps import cls_attention_maps  # noqa: E402
from cbsa_torch.interpret.capture import LayerRecord, capture  # noqa: E402
from cbsa_torch.interpret.rates import LayerRates, coding_rates  # noqa: E402
from cbsa_torch.interpret.report import report  # noqa: E402

__all__ = ["LayerRates", "LayerRecord", "capture", "cls_attention_maps", "coding_rates", "report"]
