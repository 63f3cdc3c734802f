"""Runs as a page: one self-contained report.html, to be opened in any browser, without network. See docs/using.md."""

from minirlhf.report.page import write_report

__all__ = ["write_report"]
