"""What can be known to be wrong before the first step: checks, findings and how they are shown."""

from distill_nlp.doctor.examination import examine, examine_teachers
from distill_nlp.doctor.findings import EXIT_STOP, Finding, exit_code, guarded
from distill_nlp.doctor.render import compact_lines, lines, summary, terminal_findings

__all__ = [
    "EXIT_STOP",
    "Finding",
    "compact_lines",
    "examine",
    "examine_teachers",
    "exit_code",
    "guarded",
    "lines",
    "summary",
    "terminal_findings",
]
