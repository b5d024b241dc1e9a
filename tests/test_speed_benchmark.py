"""The benchmark of speed: what it compares trains alike, and its table says what was measured."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks" / "speed"
sys.path.insert(0, str(FOLDER))
import loops  # noqa: E402
import workloads  # noqa: E402

# Not as `run`, which is also the name of another benchmark's.
_spec = importlib.util.spec_from_file_location("speed_run", FOLDER / "run.py")
run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run)

PAIR = workloads.Pair("tiny", torch.device("cpu"))
OPTIONS = argparse.Namespace(rows=8, rounds=1, batches="4x64", longest=16, models="tiny")


def grouped_rows():
    return workloads.random_rows([3, 14, 5, 12, 4, 15, 6, 13])


def test_grouped_batches_hold_each_row_once_and_pad_less():
    data = grouped_rows()
    shares = {}
    for grouped in (False, True):
        batches = workloads.batches_of(data, 4, grouped, seed=1)
        assert sorted(row for batch in batches for row in batch) == list(range(8))
        shares[grouped] = workloads.padded_share(data, batches)
    assert shares[True] == (4 * 15 + 4 * 6) / 72
    assert shares[True] < shares[False]


@pytest.fixture
def after(monkeypatch):
    """`after(way)`: the student's weights when a way has trained once over the rows."""

    def train(way):
        students, make = [], workloads.Pair.student

        def student(self, attention_dropout):
            made = make(self, attention_dropout)
            for module in made.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            students.append(made)
            return made

        monkeypatch.setattr(workloads.Pair, "student", student)
        seconds, busy = way.on(PAIR, grouped_rows(), 8)(0)
        assert seconds > 0
        assert busy > 0
        return [parameter.detach().clone() for parameter in students[0].parameters()]

    return train


WHOLE = loops.Bare(attention_dropout=0.0)


@pytest.mark.parametrize(
    "way",
    [
        replace(WHOLE, fused=True),
        replace(WHOLE, parts=4),
        replace(WHOLE, grouped=True),
        loops.Trained("plain", attention_dropout=0.0),
        loops.Trained(attention_dropout=0.0),
        loops.Trained(attention_dropout=0.0, teacher="cached"),
    ],
    ids=["fused", "parts", "grouped", "plain Trainer", "ours", "ours, cached"],
)
def test_ways_that_should_train_alike_do(after, way):
    """All rows are one batch: the order cannot matter."""
    pairs = list(zip(after(way), after(WHOLE), strict=True))
    start = [parameter.detach() for parameter in PAIR.student(0.0).parameters()]
    moved = sum(float((a - b).abs().sum()) for (a, _), b in zip(pairs, start, strict=True))
    apart = sum(float((a - b).abs().sum()) for a, b in pairs)
    assert moved > 0
    # Adam makes a full step of gradients that are rounding: a few entries may go another way.
    assert apart < 0.02 * moved


@pytest.mark.parametrize("part", ["steps", "defaults"])
def test_each_part_gives_a_table(part):
    for title, found in run.PART[part](PAIR, OPTIONS):
        text = run.table(title, found)
        assert all(f"| {name} | " in text for name in found)
        assert next(iter(found.values()))["ratio"] == 1
        assert all(figures["seconds"] > 0 for figures in found.values())


def test_a_round_starts_with_another_variant_and_ratios_are_of_one_round():
    asked = []

    def takes(name, seconds):
        def once(seed):
            asked.append(name)
            return seconds * max(seed, 1), 1.0

        return once

    found = run.measured({"a": takes("a", 2.0), "b": takes("b", 3.0)}, rounds=3)
    assert asked == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert found["b"]["range"] == [1.5, 1.5]
    assert found["b"]["seconds"] == 6.0


def test_the_command_that_is_shown_holds_no_path_of_this_machine():
    given = ["--parts", "steps", "--json", "/home/someone/speed.json", "--rows", "8", "--write", "--json=/home/x"]
    assert run.shown_command(given) == "python benchmarks/speed/run.py --parts steps --rows 8"
