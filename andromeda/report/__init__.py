"""A run as one page that needs nothing else: what was trained, on what, how it went, what it can do, how to repeat it."""

from andromeda.report.build_report import build_report, write_report

__all__ = ["build_report", "write_report"]
