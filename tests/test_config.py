"""Settings: read, overridden, and refused with their path, all at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from distill_nlp.cli_settings import dotted, value_of
from distill_nlp.config_file import leaves, load_experiment
from distill_nlp.errors import UsageError

BY_STEPS = {"eval_strategy": "steps", "eval_steps": 2}
MINIMAL = {
    "output_dir": "runs/x",
    "data": {"dataset": "somewhere"},
    "teacher": {"model": "bert"},
    "student": {"from_teacher": {"layers": 2}},
    "losses": {"kl": {"temperature": 2.0}},
}


@pytest.fixture
def write(tmp_path):
    def write(settings, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings), encoding="utf-8")
        return path

    return write


def test_a_minimal_config_gets_the_defaults(write):
    experiment = load_experiment(write(MINIMAL))
    assert experiment.seeds == [42]
    assert experiment.losses["kl"].arguments() == {"temperature": 2.0}
    assert experiment.training.learning_rate == 5e-5


def test_overrides_reach_any_leaf(write):
    overrides = {"data.max_length": 64, "losses.kl.temperature": 8, "training.adam_beta2": 0.98, "seeds": [1, 2]}
    experiment = load_experiment(write(MINIMAL), overrides)
    assert experiment.data.max_length == 64
    assert experiment.losses["kl"].arguments() == {"temperature": 8}
    assert experiment.training.model_extra == {"adam_beta2": 0.98}
    assert experiment.seeds == [1, 2]


def test_every_mistake_is_named_with_its_path_at_once(write):
    wrong = {
        **MINIMAL,
        "data": {"dataset": "x", "max_lenght": 128, "validation_fraction": 2},
        "training": {"learning_rate": "fast", "bf16": "blah", "foo": 1, "save_steps": 2},
        "losses": {"kl": {"temperature": 0}, "hiden": {}},
        "seed": 3,
    }
    with pytest.raises(UsageError) as caught:
        load_experiment(write(wrong))
    message = str(caught.value)
    assert "9 settings are wrong" in message
    assert "training.bf16: input should be a valid boolean" in message
    assert "training.foo: unknown setting" in message
    assert "training.save_steps: is not set here: it follows eval_steps" in message
    assert "losses.hiden: unknown loss" in message
    assert "data.max_lenght: unknown setting; did you mean max_length?" in message
    assert "data.validation_fraction: input should be less than 1, got 2" in message
    assert "training.learning_rate: input should be a valid number" in message
    assert "'fast'" in message
    assert "losses.kl: temperature must be > 0, got 0" in message
    assert "seed: unknown setting; did you mean seeds?" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"teacher": {}}, "teacher: needs exactly one of model and config"),
        ({"student": {"model": "a", "from_teacher": {"layers": 1}}}, "student: needs exactly one of"),
        ({"teacher": {"config": {"model_type": "bert"}}}, "data.tokenizer is needed"),
        ({"losses": {}}, "losses is empty"),
        (
            {"losses": {"hiden": {}}},
            "losses.hiden: unknown loss; there are ce, kl, ",
        ),
        ({"losses": {"kl": {"temprature": 2}}}, "kl: unknown keyword argument 'temprature'"),
        ({"losses": {"hidden": {"layers": "unifrom"}}}, "hidden: layers must be one of uniform, last, first"),
        ({"losses": {"kl": {"weight": 0}}}, "all loss weights are 0"),
        ({"losses": {"kl": {"weight": "abc"}}}, "losses.kl.weight: must be a finite number, got 'abc'"),
        ({"losses": {"kl": {"weight": None}}}, "losses.kl.weight: must be a finite number, got None"),
        ({"losses": {"kl": {"weight": True}}}, "losses.kl.weight: must be a finite number, got True"),
        ({"losses": {"kl": {"weight": -1}}}, "losses.kl.weight: must be >= 0 all the time, got -1"),
        ({"losses": {"kl": {"weight": {"schedule": "liner"}}}}, "losses.kl.weight: schedule must be one of constant, "),
        ({"training": {"projection_learning_rate": 0.1}}, "is not set here: set projection_learning_rate_factor"),
        ({"seeds": [1, 1]}, "seeds: must be distinct"),
        ({"training": {"output_dir": "x"}}, "training.output_dir: is not set here"),
        ({"training": {"learning_rat": 1}}, "training.learning_rat: unknown setting; did you mean learning_rate?"),
        ({"data": {}}, "data.dataset: is needed"),
        ({"training": {"eval_strategy": "steps"}}, "training.eval_steps: is needed with eval_strategy"),
        (
            {"training": BY_STEPS, "teacher": {"model": "a", "training": {"eval_steps": None}}},
            "teacher.training: over the settings of training, eval_steps: is needed with eval_strategy",
        ),
        (
            {"training": BY_STEPS, "phases": [{}, {"training": {"eval_steps": None}}]},
            "phases.1.training: over the settings of training, eval_steps: is needed with eval_strategy",
        ),
        ({"training": {"adam_beta2": "abc"}}, "training.adam_beta2: must be a number, got 'abc'"),
        ({"training": {"max_steps": 0}}, "training.max_steps: must be at least 1, or -1"),
        (
            {"training": {"num_train_epochs": float("inf")}},
            "training.num_train_epochs: input should be a finite number",
        ),
        ({"teacher": {"model": "a", "training": {"foo": 1}}}, "teacher.training.foo: unknown setting"),
    ],
)
def test_a_contradiction_is_refused(write, changes, expected):
    with pytest.raises(UsageError) as caught:
        load_experiment(write(MINIMAL | changes))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1", "not valid YAML"),
        ("- a\n- b", "must hold settings by name"),
        ("output_dir: a\noutput_dir: b", "the key 'output_dir' is given twice"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_what_is_no_config_is_refused(write, text, expected):
    with pytest.raises(UsageError, match=expected):
        load_experiment(write(text))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no config file"):
        load_experiment(tmp_path / "absent.yaml")


def test_a_number_without_a_point_is_a_number(write):
    text = yaml.safe_dump(MINIMAL) + "training: {learning_rate: 1e-4, adam_epsilon: 1e-8}\n"
    experiment = load_experiment(write(text))
    assert experiment.training.learning_rate == 1e-4
    assert experiment.training.model_extra == {"adam_epsilon": 1e-8}


def test_the_teachers_own_training_lies_over_the_common_one(write):
    changes = {
        "training": {"learning_rate": 1e-3, "bf16": True},
        "teacher": {"model": "b", "training": {"bf16": False}},
    }
    section = load_experiment(write(MINIMAL | changes)).teacher_training()
    assert section.learning_rate == 1e-3
    assert section.bf16 is False


def test_the_teachers_logits_are_kept_unless_the_config_says_otherwise(write):
    experiment = load_experiment(write(MINIMAL))
    assert experiment.teacher.cache is True
    assert experiment.cache_dir is None
    experiment = load_experiment(write(MINIMAL), {"teacher.cache": False, "cache_dir": "somewhere"})
    assert experiment.teacher.cache is False
    assert experiment.cache_dir == "somewhere"
    fields = dict(leaves())
    assert value_of("false", "teacher.cache", fields["teacher.cache"]) is False
    assert value_of("null", "cache_dir", fields["cache_dir"]) is None
    assert value_of("7", "cache_dir", fields["cache_dir"]) == "7"
    with pytest.raises(UsageError, match="teacher.cache: input should be a valid boolean"):
        load_experiment(write(MINIMAL), {"teacher.cache": "often"})


def test_every_setting_says_what_it_is():
    without = [name for name, field in leaves() if not field.description]
    assert not without


def test_values_of_the_command_line_are_yaml():
    fields = dict(leaves())

    def value(text, name):
        return value_of(text, name, fields[name])

    assert value("0,1,2", "seeds") == [0, 1, 2]
    assert value("[3, 4]", "seeds") == [3, 4]
    assert value("7", "seeds") == [7]
    assert value("null", "data.validation_split") is None
    assert value("no", "data.config_name") == "no"
    assert value("@x", "output_dir") == "@x"
    assert value("no,yes", "data.label_names") == ["no", "yes"]
    assert value("embeddings", "training.freeze") == ["embeddings"]
    assert value("[layer.1]", "training.freeze") == ["layer.1"]
    assert value("[]", "training.freeze") == []
    assert value("null", "data.max_train_samples") is None
    assert value("true", "training.bf16") is True
    with pytest.raises(UsageError, match="--training.bf16: '@' is not valid YAML"):
        value("@", "training.bf16")
    assert dotted(["--losses.kl.temperature", "4", "--losses.hidden.layers=[[1, 2]]"]) == {
        "losses.kl.temperature": 4,
        "losses.hidden.layers": [[1, 2]],
    }
    # A setting that is text stays as it was typed.
    assert dotted(["--data.revision", "007", "--seeds", "1,2"]) == {"data.revision": "007", "seeds": [1, 2]}
    with pytest.raises(UsageError, match="needs a value"):
        dotted(["--losses.kl.temperature"])
    # A flag may stand alone, as those of other commands do.
    flags = ["--trust_remote_code", "--training.bf16", "false", "--data.pseudo_labels"]
    assert dotted(flags) == {"trust_remote_code": True, "training.bf16": False, "data.pseudo_labels": True}


def test_epochs_on_the_command_line_come_before_the_steps_of_the_file(tmp_path):
    path = CONFIGS_FOLDER / "imdb_small.yaml"
    assert load_experiment(path).training.max_steps == 1500
    changed = load_experiment(path, {"training.num_train_epochs": 1})
    assert (changed.training.num_train_epochs, changed.training.max_steps) == (1, -1)
    both = {"training.num_train_epochs": 1, "training.max_steps": 7}
    assert load_experiment(path, both).training.max_steps == 7
    teacher = load_experiment(CONFIGS_FOLDER / "quickstart.yaml", {"teacher.training.num_train_epochs": 2})
    assert (teacher.teacher_training().max_steps, teacher.training.max_steps) == (-1, 700)


@pytest.mark.parametrize("name", ["save_only_model", "resume_from_checkpoint"])
def test_what_would_break_going_on_is_refused(name):
    with pytest.raises(UsageError, match=f"training.{name}.*an interrupted training"):
        load_experiment(CONFIGS_FOLDER / "imdb_small.yaml", {f"training.{name}": True})


CONFIGS_FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))


def test_there_are_configs():
    assert {"imdb.yaml", "imdb_small.yaml", "quickstart.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_parses(path):
    if path.parent.name == "accelerate":
        from accelerate.commands.config.config_args import load_config_from_file

        config = load_config_from_file(str(path))
        assert config.num_processes >= 1
        assert config.mixed_precision in ("no", "bf16")
    elif path.parent.name == "sweeps":
        from distill_nlp.sweep import load_sweep

        assert load_sweep(path).sweep.space
    else:
        assert all(one.losses for one in load_experiment(path).student_trainings())


def test_weights_and_temperatures_may_follow_a_schedule_in_the_file_and_on_the_command_line(write):
    cosine = {"schedule": "cosine", "start": 8.0, "end": 1.0}
    overrides = {"losses.kl.weight": {"schedule": "range", "value": 1.0, "until": 0.3}}
    settings = MINIMAL | {"losses": {"kl": {"temperature": cosine}, "ce": {}}}
    experiment = load_experiment(write(settings), overrides)
    assert experiment.losses["kl"].weight == overrides["losses.kl.weight"]
    assert experiment.losses["kl"].arguments() == {"temperature": cosine}


def test_a_ratio_does_not_reach_the_teacher_and_excludes_pseudo_labels(write):
    pool = {"dataset": "somewhere", "unlabeled": "pool"}
    settings = MINIMAL | {"data": pool, "training": {"unlabeled_ratio": 0.5}}
    experiment = load_experiment(write(settings))
    assert experiment.training.unlabeled_ratio == 0.5
    assert experiment.teacher_training().unlabeled_ratio is None
    with pytest.raises(UsageError, match=r"data\.pseudo_labels leave no row unlabeled for training\.unlabeled_ratio"):
        load_experiment(write(settings | {"data": pool | {"pseudo_labels": True}}))


def test_a_ratio_of_a_phase_needs_unlabeled_rows_too(write):
    phases = [{"training": {"max_steps": 2}}, {"training": {"unlabeled_ratio": 0.5}}]
    with pytest.raises(UsageError, match=r"phases\.1\.training\.unlabeled_ratio: there are no unlabeled rows"):
        load_experiment(write(MINIMAL | {"phases": phases}))
    pool = {"dataset": "somewhere", "unlabeled": "pool"}
    assert load_experiment(write(MINIMAL | {"phases": phases, "data": pool})).phases[1].training.unlabeled_ratio == 0.5
    with pytest.raises(UsageError, match=r"no row unlabeled for phases\.1\.training\.unlabeled_ratio"):
        load_experiment(write(MINIMAL | {"phases": phases, "data": pool | {"pseudo_labels": True}}))


def test_the_baselines_loss_is_the_cross_entropy_of_the_last_phase_that_has_one(write):
    phases = [
        {"losses": {"ce": {"label_smoothing": 0.1}}},
        {"losses": {"ce": {"label_smoothing": 0.2}, "kl": {}}},
        {"losses": {"kl": {}}},
    ]
    experiment = load_experiment(write(MINIMAL | {"phases": phases}))
    assert experiment.label_loss().arguments() == {"label_smoothing": 0.2}
    assert load_experiment(write(MINIMAL | {"losses": {"kl": {}}})).label_loss() is None


def test_members_of_an_ensemble_are_the_first_teacher_again_unless_they_name_a_model(write):
    teacher = {
        "model": "bert",
        "revision": "v1",
        "overrides": {"hidden_dropout_prob": 0.0},
        "weight": 4,
        "max_length": 64,
        "ensemble": [{"seed": 1}, {"model": "roberta", "weight": 2}, {"max_length": 32}],
    }
    members = load_experiment(write(MINIMAL | {"teacher": teacher})).teacher.members()
    assert [m.model for m in members] == ["bert", "bert", "roberta", "bert"]
    assert [m.revision for m in members] == ["v1", "v1", None, "v1"]
    assert [m.overrides for m in members] == [{"hidden_dropout_prob": 0.0}] * 2 + [{}, {"hidden_dropout_prob": 0.0}]
    assert [m.seed for m in members] == [0, 1, 0, 0]
    assert [m.weight for m in members] == [4, 1, 2, 1]
    assert [m.max_length for m in members] == [64, 64, None, 32]
    wrong = teacher | {"ensemble": [{"seed": 1, "sede": 2}, {"model": "a", "config": {"model_type": "bert"}}]}
    with pytest.raises(UsageError) as caught:
        load_experiment(write(MINIMAL | {"teacher": wrong}))
    assert "teacher.ensemble.0.sede: unknown setting" in str(caught.value)
    assert "teacher.ensemble.1: needs exactly one of model and config" in str(caught.value)


def test_freezing_is_the_students_unless_the_teacher_has_its_own(write):
    settings = MINIMAL | {"training": {"freeze": ["embeddings"], "learning_rate": 0.001}}
    experiment = load_experiment(write(settings))
    assert experiment.training.freeze == ["embeddings"]
    assert experiment.teacher_training().freeze == []
    assert experiment.teacher_training().learning_rate == 0.001
    own = settings | {"teacher": {"model": "bert", "training": {"freeze": ["layer.1"]}}}
    assert load_experiment(write(own)).teacher_training().freeze == ["layer.1"]


# ---- settings of a phase ----


@pytest.fixture
def write_text(tmp_path):
    def write(text: str) -> Path:
        (tmp_path / "phased.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "phased.yaml"

    return write


PHASED = Path(__file__).parent.parent / "configs" / "recipes" / "all_in_one.yaml"
RECIPE = PHASED.with_name("vanilla_kd.yaml")


def test_a_setting_of_a_phase_has_its_number_in_its_name():
    words = ["--phases.1.losses.kl.temperature", "4", "--phases.0.training.num_train_epochs", "1"]
    words += ["--phases.1.training.freeze", "embeddings,layer.1", "--phases.0.training.precision", "fp32"]
    first, second = load_experiment(PHASED, dotted(words)).student_trainings()
    assert second.losses["kl"].arguments() == {"temperature": 4}
    assert (first.training.num_train_epochs, second.training.num_train_epochs) == (1, 3)
    assert (first.training.freeze, second.training.freeze) == ([], ["embeddings", "layer.1"])
    assert first.training.model_fields_set & {"bf16", "fp16"}
    assert not second.training.model_fields_set & {"bf16", "fp16"}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("losses.kl.temperature", 4, "each phase has losses of its own; set phases.1.losses.kl.temperature"),
        ("losses.attention.weight", 2, "set phases.0.losses.attention.weight"),
        # In none of them: where it is most likely meant.
        ("losses.dkd.beta", 2, "set phases.1.losses.dkd.beta"),
        (
            "training.num_train_epochs",
            1,
            "does not reach the student: each phase has a length of its own; set phases.0.training.num_train_epochs",
        ),
        ("phases.2.losses.kl.weight", 1, "--phases.2.losses.kl.weight: phases has 2 entries, counted from 0, got 2"),
        ("phases.last.losses.kl.weight", 1, "phases has 2 entries, counted from 0, got last"),
        ("data.dataset.name", "x", "--data.dataset.name: data.dataset is not a block of settings"),
    ],
)
def test_an_override_that_would_change_nothing_or_leads_nowhere_is_refused(name, value, expected):
    with pytest.raises(UsageError) as error:
        load_experiment(PHASED, {name: value})
    assert expected in str(error.value)


def test_of_a_length_that_the_teacher_takes_that_is_said(write_text):
    text = PHASED.read_text().replace("training: {learning_rate: 2.0e-5, num_train_epochs: 2}", "")
    with pytest.raises(UsageError, match="or teacher.training.num_train_epochs for the teacher"):
        load_experiment(write_text(text), {"training.num_train_epochs": 1})
    # Steps come before epochs, wherever they stand.
    steps = text.replace("training: {num_train_epochs: 3}", "training: {max_steps: 3}")
    with pytest.raises(UsageError, match="each phase has a length of its own"):
        load_experiment(write_text(steps), {"training.num_train_epochs": 1})
    with pytest.raises(UsageError, match="there are no phases"):
        load_experiment(PHASED, {"phases": [], "phases.0.training.learning_rate": 1e-4})


def test_an_alias_of_yaml_is_not_shared(write_text):
    text = PHASED.read_text().replace(
        'training: {num_train_epochs: 5, eval_strategy: "no"}', "training: &t {num_train_epochs: 5}"
    )
    text = text.replace("training: {num_train_epochs: 3}", "training: *t")
    first, second = load_experiment(write_text(text), {"phases.0.training.num_train_epochs": 9}).student_trainings()
    assert (first.training.num_train_epochs, second.training.num_train_epochs) == (9, 5)


@pytest.mark.parametrize(
    ("phases", "overrides", "expected"),
    [
        ([{"training": "fast"}], {"training.max_steps": 5}, "phases.0.training"),
        ([{"losses": 7}], {"losses.kl.weight": 5}, "phases.0.losses"),
        (7, {"losses.kl.weight": 5}, "phases"),
        (
            ["x"],
            {"phases.0.training.max_steps": 5},
            "--phases.0.training.max_steps: phases.0 is not a block of settings",
        ),
    ],
)
def test_phases_that_are_none_are_said_whatever_lies_over_them(phases, overrides, expected):
    with pytest.raises(UsageError) as error:
        load_experiment(PHASED, {"phases": phases} | overrides)
    assert expected in str(error.value)


def test_a_precision_of_a_phase_that_another_override_takes_away_is_none():
    words = {"phases.0.training.precision": "fp32", "phases": [{"losses": {"kl": {}}}]}
    assert load_experiment(PHASED, words).phases[0].training.model_fields_set == set()


def test_what_a_phase_leaves_open_may_be_set_for_all(write_text):
    with pytest.raises(UsageError, match="training.max_steps does not reach the student: each phase has a length"):
        load_experiment(PHASED, {"training.max_steps": 7})
    text = PHASED.read_text().replace("training: {num_train_epochs: 3}", "training: {}")
    made = load_experiment(write_text(text), {"training.max_steps": 7})
    trainings = [one.training for one in made.student_trainings()]
    assert [(training.max_steps, training.num_train_epochs) for training in trainings] == [(-1, 5), (7, 3)]
    # Without phases they are the experiment's again.
    plain = load_experiment(PHASED, {"phases": [], "losses.kl.temperature": 3, "training.num_train_epochs": 2})
    assert plain.losses["kl"].arguments() == {"temperature": 3}


def test_a_training_with_epochs_of_its_own_does_not_take_the_steps_that_are_shared():
    shortened = load_experiment(RECIPE, {"training.max_steps": 500})
    teacher = shortened.teacher_training()
    assert (shortened.training.max_steps, teacher.max_steps, teacher.num_train_epochs) == (500, -1, 2)
    both = load_experiment(RECIPE, {"training.max_steps": 500, "teacher.training.max_steps": 9}).teacher_training()
    assert (both.max_steps, both.num_train_epochs) == (9, 2)
    # A stream has no epochs that end.
    streamed = {"data.streaming": True, "data.validation_split": "test", "training.max_steps": 500}
    assert load_experiment(RECIPE, streamed).teacher_training().max_steps == 500


def test_one_mistake_is_said_once():
    for name, value in {
        "phases.1.training.freeze": "body",
        "phases.1.training.learning_rate": "fast",
        "student.from_teacher.select": 3,
    }.items():
        with pytest.raises(UsageError) as error:
            load_experiment(PHASED, {name: value})
        assert "settings are wrong" not in str(error.value)
        assert name in str(error.value)
    for wrong in ([1, True], [1.0], "middle", ["a"]):
        with pytest.raises(UsageError, match="select: .*expected uniform, first, last, or a list of block numbers"):
            load_experiment(PHASED, {"student.from_teacher.select": wrong})


def test_early_stopping_is_for_the_phases_that_evaluate():
    made = load_experiment(PHASED, {"training.early_stopping_patience": 2, "training.early_stopping_threshold": 0.1})
    first, second = (one.training for one in made.student_trainings())
    assert (first.early_stopping_patience, second.early_stopping_patience) == (None, 2)
    assert (first.early_stopping_threshold, second.early_stopping_threshold) == (0.0, 0.1)
    assert made.teacher_training().early_stopping_patience == 2
    # Asked for just there, it is a mistake.
    asked = load_experiment(PHASED, {"phases.0.training.early_stopping_patience": 2}).student_trainings()[0]
    assert asked.training.early_stopping_patience == 2


def test_a_phase_that_freezes_nothing_releases_nothing():
    given = {"training.freeze": ["body"], "training.unfreeze_every": 3, "phases.0.training.freeze": []}
    made = load_experiment(PHASED, given)
    found = [(one.training.freeze, one.training.unfreeze_every) for one in made.student_trainings()]
    assert found == [([], None), (["body"], 3)]
