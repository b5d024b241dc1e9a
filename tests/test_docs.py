"""What the documentation says is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distill_nlp.layer_mapping import map_layers
from distill_nlp.losses import LOSSES
from distill_nlp.losses.base import TASKS

ROOT = Path(__file__).parent.parent
LETTERS = {"single_label_classification": "s", "multi_label_classification": "m", "regression": "r"}


def rows_of_the_catalogue() -> dict[str, list[str]]:
    """Name of each loss -> the cells after it."""
    rows = {}
    for line in (ROOT / "docs" / "losses.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) > 5 and cells[0].startswith("`"):
            rows[cells[0].strip("`")] = cells[1:]
    return rows


def test_the_table_of_losses_has_each_loss_once_with_its_tasks_and_cost():
    rows = rows_of_the_catalogue()
    assert list(rows) == list(LOSSES)
    for name, (_formula, _source, reads, tasks, *costs) in rows.items():
        assert tasks.split() == [LETTERS[task] for task in TASKS if task in LOSSES[name].tasks], name
        assert reads
        assert len(costs) == 4
        assert all(float(cost) > 0.1 for cost in costs), name


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_says_its_formula_source_shapes_refusals_and_an_example(name):
    text = LOSSES[name].__doc__
    parts = ["Shapes:", "Raises:", "Example:"] + (["Source"] if name != "ce" else [])
    assert [part for part in parts if part not in text] == []
    (example,) = re.findall(r">>> loss = (\w+\(.*\))", text)
    loss = eval(example, {LOSSES[name].__name__: LOSSES[name]})
    assert isinstance(loss, LOSSES[name])


def test_the_students_of_the_page_can_be_built(tmp_path):
    from helpers import make_student, make_teacher

    text = (ROOT / "docs" / "students.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    make_student().save_pretrained(tmp_path)
    shown = code.replace('"distilbert-base-uncased"', repr(str(tmp_path)))
    assert shown != code
    namespace = {"teacher": make_teacher()}
    exec(shown, namespace)
    assert [namespace["student"].config.id2label[i] for i in range(2)] == ["negative", "positive"]
    assert shown.count("student = build_student(labels") == 3


def test_the_layers_shown_are_those_that_are_mapped():
    text = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+)`[^|]*\| ((?:\d→\d+(?:, )?)+) \|$", text, flags=re.MULTILINE)
    assert len(shown) == 4
    for layers, pairs in shown:
        expected = [tuple(map(int, pair.split("→"))) for pair in pairs.split(", ")]
        assert map_layers(layers, student_depth=4, teacher_depth=12) == expected


@pytest.mark.parametrize(
    "page",
    [
        *("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/RESULTS.md", "benchmarks/SPEED.md"),
        *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
    ],
)
def test_links_between_pages_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target


def test_the_page_of_bad_inputs_counts_what_is_there():
    from collections import Counter

    from bad_inputs.cases import all_cases

    cases = all_cases()
    tried = Counter(case.category for case in cases)
    refused = Counter(case.category for case in cases if case.exit)
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \| 0 \|", text, flags=re.MULTILINE)
    found = {name: tuple(map(int, counts)) for name, *counts in rows}
    expected = {name: (tried[name], refused[name], tried[name] - refused[name]) for name in tried}
    assert found == expected | {"all": (tried.total(), refused.total(), tried.total() - refused.total())}


def test_the_page_on_security_names_tests_that_are_there():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for path in set(re.findall(r"`(tests/[\w/.]+)`", text)):
        assert (ROOT / path).is_file(), path
    sections = re.findall(r"^# ---- (.+) ----$", (ROOT / "tests" / "test_security.py").read_text(), flags=re.MULTILINE)
    assert set(sections) - {"pickles", "markup"} <= set(re.findall(r'"([^"]+)"', text))
    assert len(sections) == 5
