"""Findings: levels, what becomes of errors, exit code, lines."""

from __future__ import annotations

import pytest
from rich.console import Console

from distill_nlp.doctor import Finding, compact_lines, exit_code, guarded, lines, summary, terminal_findings
from distill_nlp.errors import DistillError, UsageError

OK = Finding("ok", "rows", "400 rows")
WARNING = Finding("warning", "truncation", "31% cut", "lost text", "--data.max_length 384")
STOP = Finding("stop", "labels", "other names", "wrong classes", "--data.label_names [a, b]")


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize("parts", [("stop", "a", "b"), ("warning", "a", "b", "why"), ("warning", "a", "b", "", "fix")])
def test_a_warning_and_a_stop_say_why_and_what_to_do(parts):
    with pytest.raises(ValueError, match="why it matters and how to mend it"):
        Finding(*parts)


def test_there_is_no_other_level():
    with pytest.raises(ValueError, match="must be stop, warning or ok, got 'error'"):
        Finding("error", "a", "b", "c", "d")


def test_a_check_gives_one_finding_or_several():
    assert guarded("rows", lambda: OK) == [OK]
    assert guarded("rows", lambda: [OK, STOP]) == [OK, STOP]
    assert guarded("rows", lambda: (f for f in (WARNING,))) == [WARNING]


@pytest.mark.parametrize("error", [UsageError("no column 'text'"), DistillError("no column 'text'")])
def test_what_would_end_the_run_is_a_stop_with_its_message(error):
    (found,) = guarded("data", raising(error))
    assert (found.level, found.check, found.what) == ("stop", "data", "no column 'text'")


def test_a_check_that_fails_itself_is_a_warning_that_says_so():
    (found,) = guarded("memory", raising(RuntimeError("first\n  second")))
    assert (found.level, found.check) == ("warning", "memory")
    assert found.what == "could not be checked: RuntimeError: first second"


def test_an_error_after_some_findings_is_caught_too():
    def run():
        yield OK
        raise KeyError("x")

    assert [found.level for found in guarded("rows", run)] == ["warning"]


def test_an_interrupt_goes_through():
    with pytest.raises(KeyboardInterrupt):
        guarded("rows", raising(KeyboardInterrupt()))


@pytest.mark.parametrize(("findings", "code"), [([], 0), ([OK, WARNING], 0), ([OK, STOP, WARNING], 2)])
def test_only_a_stop_has_exit_code_2(findings, code):
    assert exit_code(findings) == code


@pytest.mark.parametrize(
    ("findings", "said"),
    [
        ([OK], "no warning"),
        ([WARNING], "1 warning"),
        ([STOP, WARNING, WARNING], "2 warnings, 1 stop"),
        ([STOP, STOP], "2 stops"),
    ],
)
def test_the_last_line_counts(findings, said):
    assert summary(findings) == said
    assert lines(findings)[-1] == said


def test_an_ok_has_one_line_and_a_warning_three():
    found = lines([OK, WARNING])
    assert len(found) == 1 + 3 + 1
    assert found[0].split() == ["ok", "rows", "400", "rows"]
    assert found[1].startswith("warning  truncation")
    assert found[2].strip() == "why: lost text"
    assert found[3].strip() == "fix: --data.max_length 384"


def test_a_run_shows_what_needs_attention_alone():
    found = compact_lines([OK, WARNING, STOP, OK])
    assert len(found) == 3 + 3 + 1
    assert not any("400 rows" in line for line in found)
    assert found[0] == f"{'doctor':<20} warning, truncation: 31% cut"
    assert found[3].endswith("stop, labels: other names")
    assert found[-1] == f"{'doctor':<20} 3 checks, 1 warning, 1 stop"


def test_a_run_shows_how_long_it_will_take():
    found = compact_lines([OK, Finding("ok", "time", "about 12 min"), WARNING])
    assert found[0] == f"{'doctor':<20} time: about 12 min"
    assert len(found) == 1 + 3 + 1


def test_the_terminal_shows_every_word_of_what_was_found():
    console = Console(width=60, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_findings([OK, WARNING, STOP]))
    text = console.export_text()
    for finding in (OK, WARNING, STOP):
        for part in (finding.level, finding.check, finding.what, finding.why, finding.fix):
            assert part in text
    assert "1 warning, 1 stop" in text


def test_brackets_in_a_finding_are_no_markup():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_findings([Finding("ok", "special tokens", "[CLS], [bold] present")]))
    assert "[CLS], [bold] present" in console.export_text()
