"""A sweep's YAML: what is read, what is refused before anything is trained, and what a trial's experiment is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from distill_nlp.config_file import load_experiment
from distill_nlp.errors import UsageError
from distill_nlp.sweep import Sweep, load_sweep, run_sweep
from distill_nlp.sweep.command import run_command
from distill_nlp.sweep.runner import check
from distill_nlp.sweep.space import Space
from distill_nlp.training_settings import effective

TEMPERATURE = {"losses.kl.temperature": {"low": 1, "high": 8, "log": True}}


def write_sweep(config: Path, **changes) -> Path:
    """A sweep beside the config of an experiment, which it names by a relative path."""
    settings = {"experiment": config.name, "output_dir": str(config.parent / "sweep"), "space": TEMPERATURE, **changes}
    path = config.parent / "sweep.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def sweep(experiment):
    """`sweep(**settings)`: the path of a sweep over the tiny experiment, whose losses read no layers."""
    return lambda **changes: write_sweep(experiment(losses={"ce": {"weight": 0.3}, "kl": {}}), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"space": {"losses.kl.temperature": {"low": 8, "high": 1}}},
            "space.losses.kl.temperature: low must be <= high",
        ),
        ({"space": {"losses.kl.temperature": {"low": 0, "high": 1, "log": True}}}, "low must be > 0 with log, got 0"),
        ({"space": {"losses.kl.temperature": {"low": 1, "high": 2, "log": True, "step": 1}}}, "exclude each other"),
        ({"space": {"losses.kl.temperature": {"low": 1, "high": 2, "step": 0}}}, "step must be > 0, got 0"),
        ({"space": {"losses.kl.temperature": {"low": 1}}}, "space.losses.kl.temperature.high: is needed"),
        (
            {"space": {"losses.kl.temperature": {"low": 1, "high": 2, "lgo": True}}},
            "lgo: unknown setting; did you mean",
        ),
        ({"space": {"losses.kl.temperature": {"low": True, "high": 2}}}, "losses.kl.temperature.low: "),
        ({"space": {"losses.kl.temperature": []}}, "space.losses.kl.temperature: list should have at least 1 item"),
        ({"space": {"losses.kl.temperature": 3}}, "must be {low: ..., high: ...} or a list of values, got 3"),
        ({"space": {}}, "space: dictionary should have at least 1 item"),
        ({"space": {"losses.kl.temprature": [1, 2]}}, "losses.kl: unknown keyword argument 'temprature'"),
        ({"space": {"losses.lk.weight": [1, 2]}}, "losses.lk: unknown loss"),
        ({"space": {"training.learning_rat": [1, 2]}}, "training.learning_rat: unknown setting; did you mean"),
        ({"space": {"student.from_teacher.layers": [0, 2]}}, "student.from_teacher.layers: input should be greater"),
        ({"space": {"student.from_teacher.layers": {"low": 1.5, "high": 3}}}, "layers: takes whole numbers"),
        ({"space": {"training.learning_rate": [1e-4, 1e-4]}}, "training.learning_rate: a value stands twice"),
        ({"space": {"seeds": [[1], [2]]}}, "space.seeds: cannot be swept: trials run the experiment's first seed"),
        ({"space": {"data.test_split": ["a", "b"]}}, "space.data.test_split: cannot be swept: no trial reads it"),
        ({"space": {"data": [{}, {}]}}, "space.data: cannot be swept"),
        ({"space": {"report.latency_samples": [1, 2]}}, "space.report.latency_samples: cannot be swept"),
        ({"overrides": {"losses.kl.temperature": 2}}, "space.losses.kl.temperature: stands in overrides too"),
        ({"overrides": {"losses.kl": {}}}, "space.losses.kl.temperature: is set by losses.kl too"),
        ({"sampler": "grid"}, "space.losses.kl.temperature: a grid needs a step, or a list of values"),
        ({"metric": "loss"}, "metric: must be one of accuracy, f1_macro, which are maximised, got 'loss'"),
        ({"pruner": "medain"}, "pruner: input should be 'none', 'median' or 'hyperband', got 'medain'"),
        ({"trials": 0}, "trials: input should be greater than or equal to 1, got 0"),
        ({"trails": 3}, "trails: unknown setting; did you mean trials?"),
        ({"experiment": "nowhere.yaml"}, "no config file"),
    ],
)
def test_what_is_wrong_is_one_line_with_its_path_and_nothing_is_trained(sweep, tmp_path, changes, message):
    path = sweep(**changes)
    with pytest.raises(UsageError) as error:
        run_sweep(path)
    text = str(error.value)
    assert message in text
    assert str(path) in text or text.startswith("space.")
    assert "\n" not in text
    assert error.value.exit_code == 2
    assert not (tmp_path / "sweep" / "base").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "must hold settings by name, got list"),
        ("a: [", "is not valid YAML"),
        ("a: 1\na: 2", "is given twice"),
        ("trials: 2", "experiment: is needed; output_dir: is needed; space: is needed"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(tmp_path, text, message):
    path = tmp_path / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        load_sweep(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no sweep file .*nowhere\.yaml"):
        load_sweep(tmp_path / "nowhere.yaml")


def test_neither_zero_workers_nor_several_ranks_are_taken(sweep, monkeypatch):
    with pytest.raises(UsageError, match="--workers must be at least 1, got 0"):
        run_sweep(sweep(), workers=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="not launched on several ranks"):
        run_sweep(sweep())


def test_a_process_with_several_gpus_is_refused_before_it_trains_unless_it_stays_on_the_cpu(sweep, monkeypatch):
    def refuse():
        raise UsageError("several")

    monkeypatch.setattr("distill_nlp.sweep.runner.refuse_several_gpus", refuse)
    plan = load_sweep(sweep())
    with pytest.raises(UsageError, match="several"):
        check(plan, Space(plan.sweep.space), print)
    plan = load_sweep(sweep(overrides={"training.use_cpu": True}))
    check(plan, Space(plan.sweep.space), print)


def test_a_file_in_the_way_of_the_folder_is_named(sweep, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"^output_dir: .*file is a file, so .*sweep cannot be a folder"):
        run_sweep(sweep(output_dir=str(tmp_path / "file" / "sweep")))


def test_the_command_line_comes_before_the_file(sweep):
    path = sweep(trials=5, overrides={"training.max_steps": 7, "data.max_length": 12})
    plan = load_sweep(path, {"training.max_steps": 9}, output_dir="elsewhere", trials=2)
    assert plan.sweep.overrides == {"training.max_steps": 9, "data.max_length": 12}
    assert (plan.root, plan.sweep.trials) == (Path("elsewhere"), 2)


def test_an_absolute_path_to_the_experiment_stands(sweep, tmp_path):
    assert load_sweep(sweep(experiment=str(tmp_path / "config.yaml"))).config == tmp_path / "config.yaml"


def test_the_way_to_the_experiment_is_short(sweep, tmp_path):
    assert load_sweep(sweep(experiment="data/../config.yaml")).config == tmp_path / "config.yaml"


SWEEPS = sorted((Path(__file__).parent.parent / "configs" / "sweeps").glob("*.yaml"))


def test_there_are_sweeps():
    assert {"kl.yaml", "size.yaml"} <= {path.name for path in SWEEPS}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_every_sweep_holds_valid_points(path, tmp_path):
    plan = load_sweep(path)
    space = Space(plan.sweep.space)
    first, others = space.ends()
    points = [space.settings(point) for point in space.grid(0)] if plan.sweep.sampler == "grid" else [first, *others]
    assert len(points) > 1
    if plan.sweep.sampler == "grid":
        assert len(points) == plan.sweep.trials
    for point in points:
        assert plan.experiment(point, tmp_path).seeds == [0]


def test_the_page_shows_a_sweep_that_is_valid(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "sweeps.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    path = tmp_path / "sweep.yaml"
    path.write_text(text.replace("../imdb_small.yaml", str(SWEEPS[0].parent.parent / "imdb_small.yaml")))
    plan = load_sweep(path)
    shown = set(re.findall(r"^(\w+):", text, flags=re.MULTILINE))
    assert shown == set(Sweep.model_fields)
    for point in (ends := Space(plan.sweep.space).ends())[1] + [ends[0]]:
        assert plan.experiment(point, tmp_path).losses["kl"].arguments()["temperature"] in (1, 8)


def test_a_trial_has_its_settings_one_seed_and_no_test_rows(sweep, tmp_path):
    plan = load_sweep(sweep(overrides={"seeds": [4, 5], "training.max_steps": 9}))
    found = plan.experiment({"losses.kl.temperature": 3}, tmp_path / "out", tmp_path / "cache")
    assert found.seeds == [4]
    assert found.losses["kl"].arguments() == {"temperature": 3}
    assert found.training.max_steps == 9
    assert found.data.test_split == "validation"
    assert (found.output_dir, found.cache_dir) == (str(tmp_path / "out"), str(tmp_path / "cache"))


def test_the_experiments_own_cache_is_used(sweep, tmp_path):
    plan = load_sweep(sweep(overrides={"cache_dir": "shared"}))
    assert plan.experiment({}, tmp_path, tmp_path / "cache").cache_dir == "shared"


def test_without_a_split_for_validation_the_rows_of_train_stand_in_for_test(sweep, tmp_path):
    plan = load_sweep(sweep(overrides={"data.validation_split": None}))
    assert plan.experiment({}, tmp_path).data.test_split == "train"
    own = {"data.validation_split": None, "teacher.train_split": "pool"}
    with pytest.raises(UsageError, match=r"teacher\.train_split needs data\.validation_split"):
        load_sweep(sweep(overrides=own)).experiment({}, tmp_path)


@pytest.mark.parametrize(
    ("own", "metric", "expected"),
    [
        ("accuracy", None, "accuracy"),
        ("f1_macro", None, "f1_macro"),
        ("loss", None, "accuracy"),
        ("auto", None, "accuracy"),
        ("accuracy", "f1_macro", "f1_macro"),
    ],
)
def test_the_metric_is_the_sweeps_or_the_experiments_unless_that_is_a_loss(sweep, tmp_path, own, metric, expected):
    plan = load_sweep(sweep(metric=metric, overrides={"training.metric_for_best_model": own}))
    assert plan.metric(plan.experiment({}, tmp_path)) == expected


# ---- the teacher, which trials of the student's training share ----

TRIED = {
    "training.learning_rate": [1e-4, 3e-4],
    "training.max_steps": [3, 5],
    "training.per_device_train_batch_size": [4, 16, "auto"],
    "training.weight_decay": [0.0, 0.1],
}


def trained_as(experiment):
    training = experiment.teacher_training()
    # A size that is open yet is no setting of the result, and may end as another one.
    return effective(training, of_student=False) | {"auto_batch_size": training.auto_batch_size}


@pytest.mark.parametrize("own", [8, "auto"])
def test_what_is_tried_of_the_students_training_leaves_the_teacher_as_it_is(sweep, tmp_path, own):
    path = sweep(space=TRIED, overrides={"teacher.training.learning_rate": 2e-4})
    config = tmp_path / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    settings["training"]["per_device_train_batch_size"] = own
    config.write_text(yaml.safe_dump(settings))
    plan, space = load_sweep(path), Space(TRIED)
    alone = trained_as(load_experiment(config, plan.sweep.overrides))
    points = [space.settings(point) for point in space.grid(0)]
    assert len(points) == 24
    for point in points:
        trial = plan.experiment(point, tmp_path)
        assert trained_as(trial) == alone
        assert trial.training.learning_rate == point["training.learning_rate"]
        # And so the command at the end of the sweep has the same teacher.
        words = shlex.split(run_command(plan, point, tmp_path))[3:]
        given = {name.removeprefix("--"): yaml.safe_load(v) for name, v in zip(words[::2], words[1::2], strict=True)}
        assert trained_as(load_experiment(config, given)) == alone


def test_what_is_tried_of_the_teachers_training_reaches_it(sweep, tmp_path):
    space = {"training.weight_decay": [0.0, 0.1], "teacher.training.weight_decay": [0.2, 0.3]}
    plan = load_sweep(sweep(space=space))
    found = plan.experiment({"training.weight_decay": 0.1, "teacher.training.weight_decay": 0.3}, tmp_path)
    assert (found.training.weight_decay, found.teacher_training().weight_decay) == (0.1, 0.3)


def test_a_whole_block_that_is_tried_leaves_the_teacher_as_it_is(sweep, tmp_path):
    blocks = [{"max_steps": 3, "learning_rate": 1e-4}, {"max_steps": 4}]
    plan = load_sweep(sweep(space={"training": blocks}))
    alone = trained_as(load_experiment(plan.config))
    assert [trained_as(plan.experiment({"training": block}, tmp_path)) == alone for block in blocks] == [True, True]


def test_an_experiment_that_needs_the_trials_settings_has_nothing_to_keep(sweep, tmp_path):
    path = sweep(space={"training.eval_steps": [1, 2]})
    config = tmp_path / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    del settings["training"]["eval_steps"]
    config.write_text(yaml.safe_dump(settings))
    assert load_sweep(path).experiment({"training.eval_steps": 2}, tmp_path).training.eval_steps == 2
