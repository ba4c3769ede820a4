"""The pages people look at: a run, a sweep, several runs side by side, and where the loss comes from."""

from raydpo.report.write import write_comparison, write_report

__all__ = ["write_comparison", "write_report"]
