"""Findings as lines: all of them for `doctor`, what needs attention for `run`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill_nlp.doctor.findings import Finding

_STYLES = {"stop": "bold red", "warning": "yellow", "ok": "green"}


def lines(findings: Sequence[Finding]) -> list[str]:
    """One line for each ok, three for each warning and stop (what, why, fix), and the sum at the end."""
    found = []
    for finding in findings:
        found.append(f"{finding.level:<8} {finding.check:<18} {finding.what}")
        if finding.level != "ok":
            found += [f"{'':<8} {'':<18} {part}: {getattr(finding, part)}" for part in ("why", "fix")]
    return [*found, summary(findings)]


def compact_lines(findings: Sequence[Finding]) -> list[str]:
    """Warnings, stops and the time, and one line with the number of checks; in the columns of a run's messages."""
    found = []
    for finding in findings:
        if finding.level == "ok":
            if finding.check == "time":
                found.append(f"{'doctor':<20} time: {finding.what}")
            continue
        found.append(f"{'doctor':<20} {finding.level}, {finding.check}: {finding.what}")
        found += [f"{'':<20} {part}: {getattr(finding, part)}" for part in ("why", "fix")]
    checks = len({finding.check for finding in findings})
    return [*found, f"{'doctor':<20} {checks} checks, {summary(findings)}"]


def summary(findings: Sequence[Finding]) -> str:
    """How many of each kind: `2 warnings, 1 stop`; `no warning` where all is well."""
    counts = {level: sum(finding.level == level for finding in findings) for level in ("warning", "stop")}
    parts = [f"{count} {level}{'s' if count > 1 else ''}" for level, count in counts.items() if count]
    return ", ".join(parts) or "no warning"


def terminal_findings(findings: Sequence[Finding]) -> Any:
    """A `rich` renderable: a table of level, check and text, folded to the width of the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for ratio in (None, None, 1):
        table.add_column(ratio=ratio, no_wrap=ratio is None, overflow="fold")
    for finding in findings:
        table.add_row(Text(finding.level, _STYLES[finding.level]), Text(finding.check), Text(finding.what))
        if finding.level != "ok":
            table.add_row("", Text("why", "dim"), Text(finding.why))
            table.add_row("", Text("fix", "dim"), Text(finding.fix))
    return Group(table, Text(summary(findings), style="bold"))
