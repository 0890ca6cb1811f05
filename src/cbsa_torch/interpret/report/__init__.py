"""Self-contained HTML pages about one trained model, or about several side by side."""

from cbsa_torch.interpret.report.build import ReportFiles, report
from cbsa_torch.interpret.report.compare import ComparedRun, compare
from cbsa_torch.interpret.report.maps import Pictures

__all__ = ["ComparedRun", "Pictures", "ReportFiles", "compare", "report"]
