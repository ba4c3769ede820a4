"""HTML pages of a run, of a sweep, of rounds and of several runs side by side, and a page that explains the loss."""

from raydpo.reports.write import write_comparison, write_report

__all__ = ["write_comparison", "write_report"]
