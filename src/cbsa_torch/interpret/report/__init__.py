"""One self-contained HTML page about a trained model."""

from cbsa_torch.interpret.report.build import ReportFiles, report

__all__ = ["ReportFiles", "report"]
