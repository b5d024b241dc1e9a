"""What can be known to be wrong before the first step: checks, findings and how they are shown."""

from distill_nlp.doctor.examination import TIMING_SECONDS, examine, examine_teachers
from distill_nlp.doctor.findings import EXIT_STOP, Finding, exit_code, guarded
from distill_nlp.doctor.fitting import fitting_batch_size
from distill_nlp.doctor.render import compact_lines, lines, summary, terminal_findings
from distill_nlp.doctor.subject import Subject

__all__ = [
    "EXIT_STOP",
    "TIMING_SECONDS",
    "Finding",
    "Subject",
    "compact_lines",
    "examine",
    "examine_teachers",
    "exit_code",
    "fitting_batch_size",
    "guarded",
    "lines",
    "summary",
    "terminal_findings",
]
