"""Self-contained HTML pages about one trained model, or about several side by side."""

from cbsa_torch.interpret.pages.compare import ComparedRun, compare
from cbsa_torch.interpret.pages.maps import Pictures
from cbsa_torch.interpret.pages.render import PageFiles
from cbsa_torch.interpret.pages.report import report

__all__ = ["ComparedRun", "PageFiles", "Pictures", "compare", "report"]
