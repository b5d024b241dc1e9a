"""What a teacher's cached answers say beside the labels, against loops over rows, and in a run."""

from __future__ import annotations

import math

import numpy as np
import pyarrow
import pytest
from datasets import Dataset
from helpers import BINARY, label_config, make_teacher, make_tokenizer, softmax_row

from distill_nlp.cli import main
from distill_nlp.pool import cached_logits
from distill_nlp.soft_targets import LITTLE, SoftTargets, soft_targets


def answered(logits, labels):
    column = pyarrow.array([list(map(float, row)) for row in logits], type=pyarrow.list_(pyarrow.float32()))
    return Dataset.from_dict({"labels": labels}).add_column("teacher_logits", column)


def some_logits(rows=30, classes=3):
    return np.random.default_rng(0).normal(0, 2, (rows, classes)).astype(np.float32)


@pytest.mark.parametrize("order", [None, [2, 0, 1]])
def test_single_labels_against_loops(order):
    logits = some_logits()
    labels = np.random.default_rng(1).integers(0, 3, 30)
    labels[::4] = -100
    found = soft_targets(answered(logits, labels.tolist()), order)
    right, entropies = [], []
    for row, label in zip(logits, labels, strict=True):
        if label == -100:
            continue
        own = [float(row[i]) for i in (order or range(3))]
        right.append(max(range(3), key=own.__getitem__) == label)
        entropies.append(-sum(p * math.log(p) for p in softmax_row(own)))
    assert found.rows == len(right) == 22
    assert found.right == pytest.approx(np.mean(right))
    assert found.entropy == pytest.approx(np.mean(entropies), rel=1e-12)
    assert found.largest == math.log(3)


def test_several_labels_count_whole_sets_and_the_entropy_of_each_class():
    logits = some_logits()
    labels = (some_logits() + np.random.default_rng(2).normal(0, 1, (30, 3)) > 0).astype(float)
    found = soft_targets(answered(logits, labels.tolist()))
    right, entropies = [], []
    for row, wanted in zip(logits, labels, strict=True):
        chances = [1 / (1 + math.exp(-float(z))) for z in row]
        right.append(all((p > 0.5) == bool(label) for p, label in zip(chances, wanted, strict=True)))
        entropies += [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in chances]
    assert 0 < found.right < 1
    assert found.right == pytest.approx(np.mean(right))
    assert found.entropy == pytest.approx(np.mean(entropies), rel=1e-9)
    assert found.largest == math.log(2)


def test_large_logits_have_no_entropy_and_equal_ones_all_of_it():
    assert soft_targets(answered([[1e4, -1e4]], [0])).entropy == 0
    assert soft_targets(answered([[1e4, -1e4]], [[1.0, 0.0]])).entropy == 0
    assert soft_targets(answered([[7.0] * 4], [0])).entropy == pytest.approx(math.log(4))
    assert soft_targets(answered([[0.0] * 4], [[1.0] * 4])).entropy == pytest.approx(math.log(2))


def test_without_a_label_there_is_nothing_to_say():
    assert soft_targets(answered([[0.0, 1.0]], [-100])) is None


def test_little_is_a_part_of_what_an_entropy_can_be():
    for classes in (2, 7):
        most = math.log(classes)
        assert SoftTargets(1, 1.0, 0.99 * LITTLE * most, most).say_little
        assert not SoftTargets(1, 1.0, 1.01 * LITTLE * most, most).say_little


@pytest.fixture
def teacher(tmp_path):
    """`teacher(scale)`: a finished classifier whose logits are so many times those of random weights."""

    def write(scale):
        model = make_teacher(seed=1, **label_config(BINARY))
        model.classifier.weight.data *= scale
        model.classifier.bias.data *= scale
        model.save_pretrained(tmp_path / "teacher")
        make_tokenizer().save_pretrained(tmp_path / "teacher")
        return {"model": str(tmp_path / "teacher")}

    return write


KL = {"kl": {}}
HINT = "--data.unlabeled"


@pytest.mark.slow
@pytest.mark.usefixtures("no_doctor")
@pytest.mark.parametrize(
    ("scale", "losses", "hinted"),
    [(1e4, KL, True), (1.0, KL, False), (1e4, KL | {"pkd": {"layers": [[1, 4]]}}, False)],
    ids=["sure", "unsure", "with states"],
)
def test_a_run_says_once_what_the_answers_hold(experiment, teacher, capsys, scale, losses, hinted):
    config = experiment(losses=losses, teacher=teacher(scale), seeds=[0, 1])
    assert main(["run", str(config), "--stages", "student"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("soft targets")]
    assert "labeled rows, entropy " in line
    assert (HINT in line) == hinted


@pytest.mark.slow
@pytest.mark.usefixtures("no_doctor")
def test_numbers_that_are_not_finite_are_said_and_left_to_the_training(experiment, teacher, capsys, monkeypatch):
    def with_a_hole(rows, order):
        logits = cached_logits(rows).copy()
        logits[3, 0] = float("nan")
        return soft_targets(answered(logits, rows["labels"][:]), order)

    monkeypatch.setattr("distill_nlp.teacher_stages.soft_targets", with_a_hole)
    config = experiment(losses=KL, teacher=teacher(1.0))
    assert main(["run", str(config), "--stages", "student"]) == 0
    said = capsys.readouterr().err
    assert "soft targets         WARNING: the teacher's logits of row 3 are [nan, " in said


@pytest.mark.slow
@pytest.mark.usefixtures("no_doctor")
def test_phases_get_no_hint_and_a_pool_no_line(experiment, teacher, tmp_path, capsys):
    phases = [{"losses": {"hidden": {"layers": "last"}}}, {"losses": KL}]
    config = experiment(phases=phases, losses={}, teacher=teacher(1e4))
    assert main(["run", str(config), "--stages", "student"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("soft targets")]
    assert HINT not in line
    (tmp_path / "pool.txt").write_text("a b c\nd e f g\n" * 5)
    config = experiment(
        losses=KL, teacher=teacher(1e4), data__unlabeled=str(tmp_path / "pool.txt"), output_dir=str(tmp_path / "other")
    )
    assert main(["run", str(config), "--stages", "student"]) == 0
    assert "soft targets" not in capsys.readouterr().err
