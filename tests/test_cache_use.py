"""When the teacher's answers are cached, and when asking it in each step takes fewer passes."""

from __future__ import annotations

import pytest

from distill_nlp.cache_use import few_rows_read
from distill_nlp.cli import main
from distill_nlp.config import Experiment
from distill_nlp.config_file import load_experiment
from distill_nlp.materials import Materials

TRAINING = {"max_steps": 3, "per_device_train_batch_size": 8}


def make(**changes) -> Experiment:
    settings = {
        "output_dir": "run",
        "seeds": [0],
        "data": {"dataset": "data"},
        "teacher": {"model": "teacher"},
        "student": {"from_teacher": {"layers": 2}},
        "losses": {"kl": {}},
        "training": TRAINING,
    }
    return Experiment.model_validate(settings | changes)


@pytest.mark.parametrize(
    ("changes", "ranks", "read"),
    [
        ({}, 1, 24),
        ({"seeds": [0, 1, 2]}, 1, 72),
        ({}, 2, 48),
        ({"training": TRAINING | {"gradient_accumulation_steps": 2}}, 1, 48),
        ({"training": {"num_train_epochs": 0.25}}, 1, 50),
        # Each phase reads its own, and the cache serves all.
        ({"losses": {}, "phases": [{"losses": {"kl": {}}, "training": TRAINING}] * 2}, 1, 48),
    ],
)
def test_rows_are_counted_over_seeds_phases_and_ranks(changes, ranks, read):
    assert few_rows_read(make(**changes), 200, ranks).startswith(f"the students read {read} of 200 rows; ")
    assert few_rows_read(make(**changes), 2 * read + 1, ranks) is not None
    if "num_train_epochs" not in changes.get("training", {}):
        assert few_rows_read(make(**changes), 2 * read, ranks) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"num_train_epochs": 3}},
        {"teacher": {"model": "teacher", "cache": True}},
        {"cache_dir": "answers"},
        {"data": {"dataset": "data", "unlabeled": "pool.txt", "unlabeled_min_confidence": 0.9}},
        {"data": {"dataset": "data", "unlabeled": "pool.txt", "pseudo_labels": True}},
    ],
)
def test_many_rows_an_asked_for_cache_and_rows_that_answers_choose_are_cached(changes):
    assert few_rows_read(make(**changes), 1_000_000, 1) is None


@pytest.mark.parametrize(("cache", "kept"), [(None, False), (True, True)])
def test_a_short_run_asks_the_teacher_in_each_step(experiment, tmp_path, capsys, no_doctor, cache, kept):
    changes = {} if cache is None else {"teacher__cache": cache}
    config = str(experiment(losses={"kl": {}}, training__max_steps=2, **changes))
    assert main(["run", config, "--stages", "teacher,student"]) == 0
    said = capsys.readouterr().err
    # 16 of 40 rows.
    assert ("runs in every step: the students read 16 of 40 rows" in said) is not kept
    assert (tmp_path / "run" / "teacher_cache").exists() is kept
    assert ("teacher cache" in said) is kept


def test_a_cache_that_is_there_is_read(experiment, tmp_path, capsys, no_doctor):
    config = str(experiment(losses={"kl": {}}))
    assert main(["run", config, "--stages", "teacher,student"]) == 0
    capsys.readouterr()
    assert main(["run", config, "--stages", "student", "--training.max_steps", "1"]) == 0
    assert "runs in every step" not in capsys.readouterr().err
    # Not all ranks may see the folder, and they must decide alike.
    assert few_rows_read(make(output_dir=str(tmp_path / "run")), 200, 1) is None
    assert few_rows_read(make(output_dir=str(tmp_path / "run")), 200, 2) is not None


def test_a_cache_that_would_not_be_read_is_not_filled(experiment, capsys, no_doctor):
    config = str(experiment(losses={"kl": {}}, training__max_steps=2))
    assert main(["run", config, "--stages", "teacher"]) == 0
    capsys.readouterr()
    assert main(["cache", config]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line == (
        "error: nothing to cache: the students read 16 of 40 rows; teacher.cache true answers all of them ahead"
    )
    assert main(["cache", config, "--teacher.cache", "true"]) == 0


def test_phases_see_the_rows_of_all(experiment):
    phases = [{"losses": {"kl": {}}, "training": {"max_steps": steps}} for steps in (1, 2)]
    config = experiment(losses={}, phases=phases)
    whole = load_experiment(str(config), {})
    materials = Materials(whole)
    views = [materials.seen_by(own) for own in whole.student_trainings()]
    # 8 and 16 of 40 rows: each alone would be too few.
    assert [view.live_because for view in views] == [None, None]
