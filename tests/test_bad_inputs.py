"""Every input of the corpus through the command itself: refused in one line with nothing left behind, or taken."""

from __future__ import annotations

from dataclasses import replace

import datasets
import pytest
from bad_inputs.__main__ import table
from bad_inputs.cases import Case, all_cases
from bad_inputs.running import Outcome, complaints, make_models, run

from distill_nlp.errors import LONGEST_LINE, one_line, shown

CASES = all_cases()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Tables that were read once stay with the tests."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.category}: {case.name}".encode("ascii", "replace"))
def test_the_command_refuses_it_in_one_line_or_takes_it(case, models, tmp_path):
    assert complaints(case, run(case, tmp_path, models)) == []


def test_the_corpus_has_all_kinds():
    assert len([case for case in CASES if case.exit != 0]) >= 150
    assert {case.category for case in CASES} == {"configs", "data", "multi_label", "models", "commands", "streaming"}
    commands = {case.command.split()[0] for case in CASES if case.command}
    assert {"run", "predict", "compare", "export", "push", "report", "cache", "sweep", "doctor"} <= commands


REFUSAL = Case("a mistake", "configs", says="x: wrong")
RIGHT = Outcome(2, "error: x: wrong\n", "", [], 0.1)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, None),
        ({"exit": 1}, "exit code 1"),
        ({"exit": None}, "exit code None"),
        ({"stderr": ""}, "0 lines of error"),
        ({"stderr": "error: x: right\n"}, "expected 'x: wrong'"),
        ({"stderr": "a warning\nerror: x: wrong\n"}, "2 lines of error"),
        ({"stderr": "Traceback (most recent call last):\nerror: x: wrong\n"}, "a traceback"),
        ({"stderr": "error: x: wrong (--debug shows the traceback)\n"}, "nobody foresaw"),
        ({"stderr": f"error: x: wrong {'y' * 2000}\n"}, "a line of"),
        ({"changed": ["run/config.json"]}, "left or changed run/config.json"),
        ({"stderr": f"{'data':<20} 3 rows\nerror: x: wrong\n"}, None),
    ],
)
def test_what_the_corpus_complains_of(changes, found):
    said = complaints(REFUSAL, replace(RIGHT, **changes))
    assert (said == []) if found is None else any(found in line for line in said), said


def test_what_the_corpus_complains_of_in_a_valid_input():
    case = Case("an odd one", "data", exit=0)
    assert complaints(case, Outcome(0, "", "", ["run/config.json"], 0.1)) == []
    assert complaints(case, Outcome(0, "", "", ["pwned"], 0.1)) == ["it wrote pwned"]
    assert complaints(case, Outcome(2, "error: no\n", "", [], 0.1))


def test_the_table_counts_by_category(capsys):
    assert table("configs: a list at the top") == 0
    assert "| configs | 1 | 1 | 0 | 0 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nb\tc", "a b c"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("right\u202eleft", "right\\u202eleft"),
        ("caf\u00e9 \u4e2d \U0001f600", "caf\u00e9 \u4e2d \U0001f600"),
        ("lone \ud83d", "lone \\ud83d"),
    ],
)
def test_a_message_is_one_line_that_a_terminal_shows_as_it_stands(text, line):
    assert one_line(text) == line


def test_a_long_message_keeps_both_ends():
    line = one_line("start " + "x" * 10_000 + " end")
    assert len(line) == LONGEST_LINE
    assert line.startswith("start ")
    assert line.endswith(" end")
    assert len(shown(["y"] * 1000)) == 200
