"""The evidence: teacher, plain baseline and distilled student compared on the test rows."""

from distill_nlp.report.build import ReportTeacher, build_report
from distill_nlp.report.render import REPORT_FILE, render_markdown, terminal_table, write_report

__all__ = ["REPORT_FILE", "ReportTeacher", "build_report", "render_markdown", "terminal_table", "write_report"]
