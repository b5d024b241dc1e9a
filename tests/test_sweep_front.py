"""The front of a sweep against a reference over all pairs, and the tables and the picture that show it."""

from __future__ import annotations

import io
import random
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from distill_nlp.durable_files import read_json
from distill_nlp.sweep.front import pareto_front
from distill_nlp.sweep.tables import front_of, ranked, render_markdown, terminal_table, write_tables


def reference_front(points) -> set[int]:
    def beats(one, other):
        return one[0] >= other[0] and one[1] <= other[1] and one != other

    return {i for i, point in enumerate(points) if not any(beats(other, point) for other in points)}


@pytest.mark.parametrize("seed", range(60))
def test_the_front_is_what_no_other_point_beats(seed):
    rng = random.Random(seed)
    # Few values, so that there are ties in one of the two and in both.
    points = [(rng.randint(0, 5), rng.randint(0, 5)) for _ in range(rng.randint(0, 14))]
    front = pareto_front(points)
    assert set(front) == reference_front(points)
    assert len(front) == len(set(front))
    assert [points[i][1] for i in front] == sorted(points[i][1] for i in front)


def trial(number, value=None, parameters=None, state="finished", **more) -> dict:
    known = {"steps": 1500, "seconds": 12.4, "size_mb": 1.0, "teacher": "base", "reason": None, "evaluations": []}
    return {"number": number, "state": state, "settings": {"a.b": number / 4, "c": [1]}, "value": value} | (
        known | {"parameters": parameters} | more
    )


TRIALS = [
    trial(0, 0.8, 2_000_000, latency=4.0, throughput=100.0),
    trial(1, 0.9, 3_000_000, latency=3.0, throughput=120.0),
    trial(2, 0.7, 1_000_000),
    trial(3, state="pruned", reason="accuracy 0.1 at evaluation 1", steps=200),
    trial(4, state="failed", reason="out | of memory", steps=None, seconds=None),
    trial(5, 0.9, 4_000_000),
    trial(6, 0.9, 3_000_000),
]


def result(**changes) -> dict:
    teacher = {"value": 0.95, "parameters": 20_000_000, "latency": 20.0, "throughput": 10.0}
    machine = {"name": "a chip", "device": "cpu", "threads": 2}
    fronts = {cost: front_of(TRIALS, cost) for cost in ("latency", "parameters")}
    found = {"sweep": "configs/kl.yaml", "metric": "accuracy", "trials": TRIALS, "fronts": fronts, "best": 1}
    return found | {"command": "distill-nlp run x", "teacher": teacher, "machine": machine, "measured": 2} | changes


def test_the_best_comes_first_and_of_equals_the_smaller_and_then_the_earlier():
    assert [t["number"] for t in ranked(TRIALS)] == [1, 6, 5, 0, 2]


def test_a_front_has_the_trials_whose_cost_is_known():
    assert front_of(TRIALS, "parameters") == [2, 0, 1, 6]
    assert front_of(TRIALS, "latency") == [1]


def test_the_page_has_a_row_per_trial_the_command_and_the_fronts():
    page = render_markdown(result())
    assert "# kl\n" in page
    assert "Best of 7 trials (5 finished, 1 pruned, 1 failed): trial 1, accuracy 0.9000." in page
    assert "```\ndistill-nlp run x\n```" in page
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert rows[0] == "| trial | a.b | c | accuracy | steps | seconds | parameters | p50, batch 1 | rows/s | state |"
    assert rows[1] == "| teacher |  |  | 0.9500 |  |  | 20.00M | 20.0 ms | 10 |  |"
    assert rows[2] == "| 1 | 0.25 | [1] | 0.9000 | 1,500 | 12 | 3.00M | 3.0 ms | 120 | finished, on the front |"
    assert rows[4] == "| 5 | 1.25 | [1] | 0.9000 | 1,500 | 12 | 4.00M |  |  | finished |"
    assert rows[7] == "| 3 | 0.75 | [1] |  | 200 | 12 |  |  |  | pruned: accuracy 0.1 at evaluation 1 |"
    assert rows[8] == r"| 4 | 1.0 | [1] |  |  |  |  |  |  | failed: out \| of memory |"
    assert "- not beaten in accuracy and latency: trials 1\n" in page
    assert "- not beaten in accuracy and size: trials 2, 0, 1, 6\n" in page
    assert "a chip (cpu, 2 threads)" in page


def test_the_terminal_shows_the_same_rows():
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(terminal_table(result()))
    text = console.export_text()
    words = [line.split() for line in text.splitlines() if line.split()]
    # The last part of a dotted name, where that is enough.
    assert words[0] == "trial b c accuracy parameters p50, batch 1 state".split()
    assert [line[0] for line in words[2:10]] == ["teacher", "1", "6", "5", "0", "2", "3", "4"]
    assert "0.9500" in text
    assert "pruned: accuracy 0.1" in text
    assert "trial 1, accuracy 0.9000." in text


def test_without_a_finished_trial_there_is_a_table_and_no_picture(tmp_path):
    nothing = result(trials=TRIALS[3:5], fronts={"parameters": []}, best=None, command=None)
    del nothing["teacher"], nothing["machine"]
    write_tables(nothing, tmp_path)
    assert "No trial is finished." in (tmp_path / "sweep.md").read_text()
    assert not (tmp_path / "pareto.svg").exists()


def test_the_picture_shows_teacher_trials_and_fronts_the_same_each_time(tmp_path):
    write_tables(result(), tmp_path)
    first = (tmp_path / "pareto.svg").read_bytes()
    texts = ["".join(element.itertext()).strip() for element in ElementTree.fromstring(first).iter() if element.text]
    for expected in (
        "latency of one row, ms (p50)",
        "parameters, millions",
        "validation accuracy",
        "teacher",
        "front",
        "1, 6",
    ):
        assert expected in texts, expected
    write_tables(result(), tmp_path)
    assert (tmp_path / "pareto.svg").read_bytes() == first
    write_tables(result(teacher=None), tmp_path)
    assert b">teacher<" not in (tmp_path / "pareto.svg").read_bytes()
    assert read_json(tmp_path / "sweep.json")["best"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.json", "sweep.md", "pareto.svg"}
