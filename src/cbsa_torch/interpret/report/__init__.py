"""Self-contained HTML pages about one trained model, or about several side by side."""

from cbsa_torch.interpret.report.build import ReportFiles, report
from cbsa_torch.interpret.report.compare import compare
from cbsa_torch.interpret.report.maps import Pictures
from cbsa_torch.interpret.report.side_by_side import ComparedRun

__all__ = ["ComparedRun", "Pictures", "ReportFiles", "compare", "report"]
