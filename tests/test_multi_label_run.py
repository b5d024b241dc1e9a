"""The command on texts with several labels, on tiny data and models: all stages, and what each makes of lists."""

from __future__ import annotations

import json

import pytest
from helpers import TOPICS, write_rows_of_several_labels

from distill_nlp.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_doctor")]
MULTI_LABEL = "multi_label_classification"


@pytest.fixture
def several(experiment, tmp_path):
    """`several(dotted changes)`: the path of a config of a tiny multi-label experiment."""
    write_rows_of_several_labels(tmp_path / "topics")
    data = {"data__dataset": str(tmp_path / "topics"), "data__label_column": "labels", "data__label_names": None}
    return lambda **changes: experiment(**(data | changes))


def record_of(folder) -> dict:
    return json.loads((folder / "stage.json").read_text())


def test_texts_with_several_labels_go_through_all_stages(several, tmp_path, capsys):
    assert main(["run", str(several(data__unlabeled="pool"))]) == 0
    said, run = capsys.readouterr(), tmp_path / "run"
    for name in ("teacher", "baseline/seed-0", "student/seed-0"):
        config = json.loads((run / name / "config.json").read_text())
        assert config["problem_type"] == MULTI_LABEL
        assert list(config["id2label"].values()) == list(TOPICS)
        record = record_of(run / name)
        assert {"accuracy", "f1_macro", "f1_micro"} <= record["validation"].keys()
        assert record["fingerprint"]["training"]["metric_for_best_model"] == "f1_macro"
    report = json.loads((run / "report.json").read_text())
    assert (report["problem_type"], report["metric"], report["test_rows"]) == (MULTI_LABEL, "f1_macro", 24)
    assert said.err.count("validation f1_macro") >= 3
    assert "validation accuracy" not in said.err
    for word in ("macro-F1", "micro-F1", "exact match", "McNemar on rows whose labels are all right, seed 0"):
        assert word in said.out
        assert word in (run / "report.md").read_text()
    assert main(["run", str(several(data__unlabeled="pool"))]) == 0
    assert capsys.readouterr().err.count("done already") == 4
