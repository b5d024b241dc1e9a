"""Exports in the report: which are found, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import make_student, make_tokenizer

from distill_nlp.loading import checkpoint_print
from distill_nlp.report.exports import export_head, export_rows, read_exports
from distill_nlp.report.schema import Export

LATENCY = {"p50": 1.5, "p95": 2.0, "p99": 2.5}
MACHINE = {"device": "cpu", "name": "a processor", "cores": 2, "threads": 2}


@pytest.fixture
def student(tmp_path):
    folder = tmp_path / "student" / "seed-3"
    make_student().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def lay_export(student, name="onnx-int8", **changes):
    """An export's folder, as far as a report reads it."""
    folder = student.with_name(f"{student.name}-{name}")
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"graph")
    record = {
        "model": checkpoint_print(str(student)),
        "numbers": "int8",
        "parity": {
            "source": "data, test",
            "rows": 4000,
            "flips": 7,
            "max_difference": 0.25,
            "metric": "accuracy",
            "original": 0.85,
            "exported": 0.8475,
        },
        "size_mb": {"original": 80.0, "exported": 20.0},
        "speed": {
            "batch_size": 16,
            "machine": MACHINE,
            "teacher": {"latency_ms": LATENCY, "throughput": 50.0},
            "original": {"latency_ms": LATENCY, "throughput": 200.0},
            "exported": {"latency_ms": LATENCY, "throughput": 500.0},
        },
    }
    for key, value in changes.items():
        record[key] = record[key] | value if isinstance(value, dict) and isinstance(record[key], dict) else value
    (folder / "export.json").write_text(json.dumps(record))
    return folder


def shown(student):
    return dict(export_rows({"exports": read_exports({3: student})}))


def test_an_export_is_shown_beside_its_student_and_its_teacher(student):
    lay_export(student)
    (found,) = read_exports({3: student})
    assert Export.model_validate(found).speed.times_teacher == 10
    assert found["name"] == "seed-3-onnx-int8"
    assert export_head({"exports": [found]}) == ["", "seed 3, ONNX int8"]
    assert shown(student) == {
        "accuracy of the student": "0.8500",
        "accuracy of the export": "0.8475",
        "rows with another label": "7 of 4,000",
        "rows": "data, test",
        "size of the weights": "80.0 → 20.0 MB",
        "latency p50, batch 1": "1.5 ms",
        "throughput": "500/s",
        "  against the student": "2.5×",
        "  against the teacher": "10.0×",
    }


def test_what_was_not_measured_is_not_claimed(student):
    folder = lay_export(student, speed=None)
    record = json.loads((folder / "export.json").read_text())
    for key in ("metric", "original", "exported"):
        del record["parity"][key]
    (folder / "export.json").write_text(json.dumps(record))
    found = shown(student)
    assert {found[f"accuracy of the {which}"] for which in ("student", "export")} == {"no labels"}
    assert [title for title, cell in found.items() if cell == "not timed"] == [
        "latency p50, batch 1",
        "throughput",
        "  against the student",
        "  against the teacher",
    ]


def test_without_a_teacher_times_are_those_of_the_student(student):
    record = json.loads((lay_export(student) / "export.json").read_text())
    del record["speed"]["teacher"]
    (student.with_name("seed-3-onnx-int8") / "export.json").write_text(json.dumps(record))
    assert shown(student)["  against the student"] == "2.5×"
    assert shown(student)["  against the teacher"] == "not timed"


def test_macro_f1_is_called_by_its_name(student):
    lay_export(student, parity={"metric": "f1_macro"})
    rows = export_rows({"metric": "f1_macro", "exports": read_exports({3: student})})
    assert rows[0] == ("macro-F1 of the student", "0.8500")


def test_several_exports_of_several_seeds_stand_in_order(student):
    other = student.with_name("seed-30")
    make_student(seed=5).save_pretrained(other)
    for name, numbers in (("onnx-int8", "int8"), ("onnx", "fp32")):
        lay_export(student, name, numbers=numbers)
    lay_export(other)
    found = [(one["seed"], one["numbers"]) for one in read_exports({30: other, 3: student})]
    assert found == [(30, "int8"), (3, "fp32"), (3, "int8")]


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"content": "0123456789abcdef"}},  # of weights that are no longer the student's
        {"model": None},
        {"parity": None},
        {"size_mb": {"exported": "small"}},
        {"numbers": "int4"},
    ],
)
def test_an_export_that_is_not_of_this_student_or_torn_is_left_out(student, change):
    lay_export(student, **change)
    lay_export(student, "onnx", numbers="fp32")
    assert [one["numbers"] for one in read_exports({3: student})] == ["fp32"]


def test_a_run_without_exports_has_none(student):
    assert read_exports({3: student}) == []
    assert export_rows({}) == export_head({}) == []


@pytest.mark.parametrize(
    ("model", "output", "shown"),
    [
        ("run/student/seed-3", None, "run"),
        ("run/student/seed-3", "run/student/seed-3-small", "run"),
        ("run/student/seed-3", "elsewhere", None),  # where no report looks
        ("run/baseline/seed-3", None, None),
        ("other/student/seed-3", None, None),  # of no run
    ],
)
def test_the_run_that_will_show_an_export_is_named_however_paths_are_given(tmp_path, monkeypatch, model, output, shown):
    from distill_nlp.cli_export import _run_of
    from distill_nlp.export import ExportSettings

    monkeypatch.chdir(tmp_path)
    (tmp_path / model).mkdir(parents=True)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "report.json").write_text("{}")
    for start in ("", f"{tmp_path}/"):
        found = _run_of(ExportSettings(start + model, output=output))
        assert found == (None if shown is None else Path(start + shown))
