"""The evidence: teacher, plain baseline and distilled student compared on the test rows."""

from distill_nlp.report.build import build_report, machine
from distill_nlp.report.earlier import PREDICTIONS_FILE, REPORT_FILE, REPORT_MANIFEST_FILE, read_earlier
from distill_nlp.report.evaluation import ReportTeacher
from distill_nlp.report.exports import read_exports
from distill_nlp.report.page import NO_PLOTS
from distill_nlp.report.plots import is_available as can_plot
from distill_nlp.report.render import terminal_table
from distill_nlp.report.rows import read_rows
from distill_nlp.report.schema import SCHEMA_VERSION
from distill_nlp.report.write import PAGE_FILE, render_markdown, write_report

__all__ = [
    "NO_PLOTS",
    "PAGE_FILE",
    "PREDICTIONS_FILE",
    "REPORT_FILE",
    "REPORT_MANIFEST_FILE",
    "SCHEMA_VERSION",
    "ReportTeacher",
    "build_report",
    "can_plot",
    "machine",
    "read_earlier",
    "read_exports",
    "read_rows",
    "render_markdown",
    "terminal_table",
    "write_report",
]
