"""Dimensions of a sweep: what is sampled, what a grid holds, and the command that a point becomes."""

from __future__ import annotations

import shlex

import optuna
import pytest
from pydantic import TypeAdapter
from test_sweep_plan import write_sweep

from distill_nlp.cli import main
from distill_nlp.config import Experiment
from distill_nlp.errors import UsageError
from distill_nlp.sweep import load_sweep
from distill_nlp.sweep.command import argument, run_command, shown
from distill_nlp.sweep.plan import Dimension
from distill_nlp.sweep.space import Space


def space_of(**dimensions) -> Space:
    checked = TypeAdapter(dict[str, Dimension]).validate_python(
        {k.replace("__", "."): v for k, v in dimensions.items()}
    )
    return Space(checked)


def drawn(space: Space, count: int = 40) -> list[dict]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = []
    for _ in range(count):
        trial = study.ask()
        space.sample(trial)
        points.append(space.settings(trial.params))
    return points


@pytest.mark.parametrize(
    ("name", "low", "high", "kind"),
    [
        ("losses.kl.temperature", 1, 8, float),
        ("losses.kl.weight", 0, 2, float),
        ("losses.hidden.rank", 1, 8, int),
        ("losses.dkd.beta", 1, 8, float),
        ("training.learning_rate", 1e-5, 1e-3, float),
        ("training.num_train_epochs", 1, 5, float),
        ("training.per_device_train_batch_size", 4, 32, int),
        ("training.adam_beta2", 0, 1, float),
        ("training.lr_scheduler_kwargs", 1, 9, int),
        ("student.from_teacher.layers", 1, 4, int),
        ("student.config.dim", 16, 64, int),
        ("student.overrides.dropout", 0.0, 1, float),
        ("phases.1.losses.kl.weight", 0, 2, float),
        ("phases.0.training.per_device_train_batch_size", 4, 32, int),
    ],
)
def test_numbers_are_whole_where_the_setting_is(name, low, high, kind):
    values = [point[name] for point in drawn(space_of(**{name: {"low": low, "high": high}}))]
    assert {type(value) for value in values} == {kind}
    assert all(low <= value <= high for value in values)
    assert len(set(values)) > 3


def test_a_sampled_number_has_four_digits_and_stays_in_range():
    found = space_of(a={"low": 0.12344, "high": 7.99996})
    assert found.settings({"a": 3.14159}) == {"a": 3.142}
    assert found.settings({"a": 0.12344}) == {"a": 0.12344}
    assert found.settings({"a": 7.99996}) == {"a": 7.99996}


@pytest.mark.filterwarnings("error")
def test_steps_and_logarithms_are_kept():
    stepped = {point["a"] for point in drawn(space_of(a={"low": 0.1, "high": 0.75, "step": 0.2}))}
    assert stepped == {0.1, 0.3, 0.5, 0.7}
    fine = {point["a"] for point in drawn(space_of(a={"low": 1.00001, "high": 1.00004, "step": 0.00001}))}
    assert fine == {1.00001, 1.00002, 1.00003, 1.00004}
    whole = {point["b"] for point in drawn(space_of(b={"low": 1, "high": 8, "step": 3}))}
    assert whole == {1, 4, 7}
    logarithmic = sorted(point["a"] for point in drawn(space_of(a={"low": 1e-4, "high": 1.0, "log": True}), 100))
    assert 1e-3 < logarithmic[50] < 1e-1


def test_choices_keep_their_kind():
    values = [1, True, None, "uniform", 0.5, [[1, 2], [3, 4]], {"layers": 2}]
    found = drawn(space_of(a=values), 80)
    assert {repr(point["a"]) for point in found} == {repr(value) for value in values}


@pytest.mark.parametrize("value", [float, {1, 2}])
def test_a_choice_that_yaml_cannot_hold_is_refused(value):
    with pytest.raises(UsageError, match=r"space\.a: .* is no number, text"):
        space_of(a=[value])


def test_a_block_in_another_order_stands_twice():
    with pytest.raises(UsageError, match=r"space\.a: a value stands twice"):
        space_of(a=[{"x": 1, "y": 2}, {"y": 2, "x": 1}])


def test_a_grid_has_each_point_once_in_an_order_of_the_seed():
    space = space_of(a=["x", "y"], b={"low": 1, "high": 3}, c={"low": 0.1, "high": 0.3, "step": 0.1})
    points = [space.settings(point) for point in space.grid(0)]
    expected = [{"a": a, "b": b, "c": c} for a in "xy" for b in (1, 2, 3) for c in (0.1, 0.2, 0.3)]
    assert sorted(points, key=str) == sorted(expected, key=str)
    assert points == [space.settings(point) for point in space.grid(0)]
    assert points != [space.settings(point) for point in space.grid(1)]


def test_the_ends_are_the_first_point_and_what_differs_from_it_in_one_dimension():
    first, others = space_of(a={"low": 1, "high": 8}, b=["x", "y", "z"]).ends()
    assert first == {"a": 1, "b": "x"}
    assert others == [{"a": 8, "b": "x"}, {"a": 1, "b": "y"}, {"a": 1, "b": "z"}]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.1e-05, "3.1e-05"),
        (True, "true"),
        (None, "null"),
        ([1, 2], "[1, 2]"),
        ({"a": "x"}, '{"a": "x"}'),
        ("last", "last"),
        ("1e-4", '"1e-4"'),
        ("yes", '"yes"'),
        ("a: b", '"a: b"'),
        ("a,b", '"a,b"'),
        ("[", '"["'),
        ("", '""'),
        ("--a", '"--a"'),
    ],
)
def test_a_value_reads_back_as_what_it_is(value, text):
    assert shown(value) == text


def test_a_text_stands_as_it_is_where_the_setting_is_text():
    assert argument("data.revision", "1e-4") == "1e-4"
    assert argument("data.truncation_side", "left") == "left"
    assert argument("phases.0.training.eval_strategy", "no") == "no"
    assert argument("losses.a.b", "1e-4") == '"1e-4"'


def test_the_command_gives_the_experiment_that_the_trial_was(experiment, tmp_path, monkeypatch):
    losses = {"ce": {"weight": 0.3}, "kl": {}, "hidden": {}}
    space = {
        "losses.kl.temperature": {"low": 1, "high": 8},
        "losses.hidden.layers": ["uniform", [[1, 2]]],
        "student.from_teacher.layers": [1, 2],
        "training.learning_rate": {"low": 1e-5, "high": 1e-3},
    }
    overrides = {"data.revision": "007", "training.lr_scheduler_type": "cosine", "seeds": [0, 1]}
    plan = load_sweep(write_sweep(experiment(losses=losses), space=space, overrides=overrides))
    settings = {
        "losses.kl.temperature": 3.142,
        "losses.hidden.layers": [[1, 2]],
        "student.from_teacher.layers": 1,
        "training.learning_rate": 3.1e-05,
    }
    words = shlex.split(run_command(plan, settings, tmp_path / "with space" / "base"))
    assert words[:3] == ["distill-nlp", "run", str(tmp_path / "config.yaml")]
    seen: list[Experiment] = []

    class Recorder:
        def __init__(self, experiment, say):
            seen.append(experiment)

        def run(self, stages, **options):
            assert stages == ("teacher", "baseline", "student", "report")

    monkeypatch.setattr("distill_nlp.pipeline.Pipeline", Recorder)
    assert main(words[1:]) == 0
    trial = plan.experiment(settings, tmp_path / "with space" / "base")
    own = {"data": trial.data.model_copy(update={"test_split": "test"}), "seeds": [0, 1]}
    assert seen == [trial.model_copy(update=own)]
    assert seen[0].data.revision == "007"
