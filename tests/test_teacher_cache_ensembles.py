"""Teachers with tokens of their own and ensembles in the cache: each member by itself, the mean as the live one's."""

import json
import re

import pytest
import torch
from cache_run import cached, counted
from helpers import (
    bert_config,
    label_config,
    largest_difference,
    make_dataset,
    make_student,
    make_teacher,
    make_tokenizer,
    parameters_of,
    seeded,
    step_logs,
)
from test_teacher import OTHER_VOCAB, other_tokenizer, permuted, two_token_rows
from transformers import BertForSequenceClassification

from distill_nlp import CachedTeacher, CrossEntropyLoss, KLDivergenceLoss, LogitsMSELoss, PKDLoss, teacher_source
from distill_nlp.cache_filling import cached_answers
from distill_nlp.ensemble import TeacherEnsemble, mean_logits
from distill_nlp.teacher import Teacher
from distill_nlp.teacher_source import TeacherSource

SINGLE = "single_label_classification"


def own_tokenizer():
    """Another vocabulary, padded at the end: at the start, a BERT's answers follow the width of the batch."""
    tokenizer = other_tokenizer()
    tokenizer.padding_side = "right"
    return tokenizer


def own_model(seed=1, **changes):
    return make_teacher(seed, vocab_size=OTHER_VOCAB, pad_token_id=3, **changes)


def own_rows(rows=16):
    return two_token_rows(rows)[0]


def as_students(rows):
    """The teacher's tokens as a student's, and nothing else."""
    return rows.select_columns([c for c in rows.column_names if c.startswith("teacher_")]).rename_columns(
        {c: c.removeprefix("teacher_") for c in rows.column_names if c.startswith("teacher_")}
    )


def alone(model, rows, prefix=""):
    """The logits of each row by itself, without padding."""
    names = ("input_ids", "token_type_ids", "attention_mask")
    found = []
    for row in rows:
        with torch.no_grad():
            inputs = {n: torch.tensor([row[prefix + n]]) for n in names if prefix + n in row}
            found.append(model(**inputs).logits[0])
    return torch.stack(found)


def column(rows):
    return torch.tensor(rows.with_format(None)["teacher_logits"][:])


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


# ---- tokens of its own ----


def test_a_teacher_is_asked_for_its_own_tokens_and_pads_them_by_its_own_tokenizer(tmp_path):
    rows = own_rows()
    model, seen = counted(own_model())
    padding = []
    model.register_forward_pre_hook(
        lambda _, __, inputs: padding.extend(inputs["input_ids"][inputs["attention_mask"] == 0].tolist()),
        with_kwargs=True,
    )
    answered, (line,) = cached(tmp_path, Teacher(model, own_tokenizer()), rows, batch_size=5)
    assert sorted(seen) == sorted(rows["teacher_input_ids"])
    assert set(padding) == {3}
    assert_close(column(answered), alone(own_model(), rows, "teacher_"))
    assert answered.column_names == [*rows.column_names, "teacher_logits"]
    assert "16 rows, 0.0% there" in line


def test_its_cache_is_that_of_runs_in_which_these_are_the_students_tokens(tmp_path):
    rows = own_rows()
    for first, second in (
        [(Teacher(own_model(), own_tokenizer()), rows), (own_model(), as_students(rows))],
        [(own_model(), as_students(rows)), (Teacher(own_model(), own_tokenizer()), rows)],
    ):
        folder = tmp_path / type(first[0]).__name__
        cached(folder, *first, states=[(4, "mean")])
        _, (line,) = cached(folder, *second, states=[(4, "mean")])
        assert "16 rows, 100.0% there, 0 computed" in line


def test_another_prefix_reads_other_columns(tmp_path):
    rows = own_rows(6)
    names = {c: c.replace("teacher_", "teacher_2_") for c in rows.column_names if c.startswith("teacher_")}
    both = rows.rename_columns(names).add_column("teacher_input_ids", [[2, 3]] * 6)
    answered, _ = cached(tmp_path, Teacher(own_model(), own_tokenizer(), prefix="teacher_2_"), both)
    assert_close(column(answered), alone(own_model(), rows, "teacher_"))


def test_a_teacher_without_tokens_of_its_own_is_the_model(tmp_path):
    cached(tmp_path, make_teacher())
    _, (line,) = cached(tmp_path, Teacher(make_teacher()))
    assert "100.0% there" in line
    # A tokenizer that is the student's changes nothing either.
    _, (line,) = cached(tmp_path, Teacher(make_teacher(), make_tokenizer(), prefix=""))
    assert "100.0% there" in line


def test_data_without_its_tokens_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"no token ids \(teacher_input_ids\) in the data, only input_ids, "):
        cached(tmp_path, Teacher(own_model(), own_tokenizer()))
    rows = make_dataset(3).add_column("teacher_input_ids", [0.5, 1.5, 2.5])
    with pytest.raises(ValueError, match="the column teacher_input_ids must hold lists of whole numbers, got double"):
        cached(tmp_path, Teacher(own_model(), own_tokenizer()), rows)
    rows = own_rows(3).remove_columns("teacher_token_type_ids").add_column("teacher_token_type_ids", [[0]] * 3)
    with pytest.raises(ValueError, match="rows of teacher_.* are not as long as those of teacher_input_ids"):
        cached(tmp_path, Teacher(own_model(), own_tokenizer()), rows)


def test_the_column_of_one_teacher_keeps_its_own_labels(tmp_path):
    """Its `CachedTeacher` orders and restricts them."""
    turned = permuted(make_teacher(), [2, 0, 1])
    answered, _ = cached(tmp_path, Teacher(turned, restrict_labels=True))
    assert_close(column(answered), alone(turned, make_dataset()))


# ---- ensembles ----


def test_each_member_has_its_folder_and_the_column_is_their_mean(tmp_path):
    first, second, data = make_teacher(1), make_teacher(7), make_dataset()
    rows, lines = cached(tmp_path, TeacherEnsemble([first, second], [3, 1]))
    expected = mean_logits([alone(first, data), alone(second, data)], [0.75, 0.25], "probabilities", SINGLE)
    assert_close(column(rows), expected)
    assert rows.features["teacher_logits"].feature.dtype == "float32"
    assert len(list(tmp_path.iterdir())) == 2
    assert len(lines) == 2
    for i, line in enumerate(lines):
        assert line.startswith(f"BertForSequenceClassification ({i + 1} of 2): 16 rows, 0.0% there, 16 computed in ")


def test_adding_a_member_or_changing_weights_and_mean_computes_no_row_again(tmp_path):
    members = [make_teacher(1), make_teacher(7), make_teacher(9)]
    cached(tmp_path, TeacherEnsemble(members[:2]))
    (_, first), (_, second), (third, seen) = (counted(member) for member in members)
    rows, lines = cached(tmp_path, TeacherEnsemble([members[2], *members[:2]], [1, 2, 5], "logits"))
    assert first == second == []
    assert len(seen) == 16
    assert [re.search(r"rows, (\S+) there", line).group(1) for line in lines] == ["0.0%", "100.0%", "100.0%"]
    data = make_dataset()
    logits = [alone(member, data) for member in (third, *members[:2])]
    assert_close(column(rows), (logits[0] + 2 * logits[1] + 5 * logits[2]) / 8)
    # One of them alone is served too.
    _, (line,) = cached(tmp_path, make_teacher(9))
    assert "100.0% there" in line


def test_members_labels_are_brought_into_the_first_ones_order(tmp_path):
    first, second, data = make_teacher(1), make_teacher(7), make_dataset()
    plain, _ = cached(tmp_path, TeacherEnsemble([first, second]))
    turned, _ = cached(tmp_path, TeacherEnsemble([permuted(first, [1, 2, 0]), permuted(second, [2, 0, 1])]))
    assert_close(column(turned), column(plain)[:, [1, 2, 0]])
    assert (column(plain) - alone(first, data)).abs().max() > 0.1


def wide_teacher(seed=7, labels=("extra", "positive", "negative", "neutral")):
    return make_teacher(seed, **label_config(labels))


def test_a_member_with_more_labels_is_restricted_where_it_says_so(tmp_path):
    wide, data = wide_teacher(), make_dataset()
    rows, _ = cached(tmp_path, TeacherEnsemble([make_teacher(), Teacher(wide, restrict_labels=True)]))
    expected = [alone(make_teacher(), data), alone(wide, data)[:, [2, 3, 1]]]
    assert_close(column(rows), mean_logits(expected, [0.5, 0.5], "probabilities", SINGLE))
    teacher, seen = counted(make_teacher(3))
    with pytest.raises(ValueError, match="hold more than the student's"):
        cached(tmp_path, TeacherEnsemble([teacher, wide]))
    assert seen == []


def test_a_first_member_with_more_labels_needs_the_students(tmp_path):
    members = [Teacher(wide_teacher(s), restrict_labels=True) for s in (7, 8)]
    with pytest.raises(
        ValueError, match="the first teacher of the ensemble keeps only the student's labels.*student_config="
    ):
        cached(tmp_path, TeacherEnsemble(members))
    rows, _ = cached(tmp_path, TeacherEnsemble(members), student_config=make_student().config)
    expected = [alone(member.model, make_dataset())[:, [2, 3, 1]] for member in members]
    assert_close(column(rows), mean_logits(expected, [0.5, 0.5], "probabilities", SINGLE))


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression", SINGLE])
def test_the_first_members_kind_of_task_says_what_is_meant_by_a_mean(tmp_path, problem_type):
    members, data = [make_teacher(1), make_teacher(7)], make_dataset()
    for member, kind in zip(members, (problem_type, None), strict=True):
        member.config.problem_type = kind
    rows, _ = cached(tmp_path, TeacherEnsemble(members, [1, 2]))
    assert_close(
        column(rows), mean_logits([alone(m, data) for m in members], [1 / 3, 2 / 3], "probabilities", problem_type)
    )


def test_an_ensemble_of_one_answers_as_the_live_one(tmp_path):
    rows, (line,) = cached(tmp_path, TeacherEnsemble([make_teacher()]))
    assert_close(column(rows), alone(make_teacher(), make_dataset()).log_softmax(-1))
    assert " of 1" not in line


def test_members_with_different_tokens(tmp_path):
    rows = own_rows()
    members = [make_teacher(), Teacher(own_model(7), own_tokenizer()), Teacher(own_model(8), prefix="teacher_")]
    (_, seen), (_, own), (_, shared) = (counted(m.model if isinstance(m, Teacher) else m) for m in members)
    answered, lines = cached(tmp_path, TeacherEnsemble(members), rows)
    assert sorted(seen) == sorted(rows["input_ids"])
    assert sorted(own) == sorted(shared) == sorted(rows["teacher_input_ids"])
    logits = [alone(make_teacher(), rows), alone(own_model(7), rows, "teacher_"), alone(own_model(8), rows, "teacher_")]
    assert_close(column(answered), mean_logits(logits, [1 / 3] * 3, "probabilities", SINGLE))
    assert len(lines) == 3


def test_states_of_an_ensemble_are_refused_in_one_line(tmp_path):
    teacher, seen = counted(make_teacher())
    for members in ([teacher], [teacher, make_teacher(7)]):
        with pytest.raises(
            ValueError, match="states are those of one teacher's layers, which an ensemble has not; leave "
        ):
            cached(tmp_path, TeacherEnsemble(members), states=[(1, "first")])
    assert seen == []


def test_what_is_wrong_with_the_last_member_is_found_before_the_first_one_computes(tmp_path):
    teacher, seen = counted(make_teacher())
    with pytest.raises(ValueError, match=r"no token ids \(teacher_input_ids\)"):
        cached(tmp_path, TeacherEnsemble([teacher, Teacher(own_model(), own_tokenizer())]))
    assert seen == []


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_members_in_half_precision_say_their_rounding_each(tmp_path, storage):
    rows, lines = cached(tmp_path, TeacherEnsemble([make_teacher(1), make_teacher(7)]), storage=storage)
    plain, _ = cached(tmp_path, TeacherEnsemble([make_teacher(1), make_teacher(7)]))
    manifests = [json.loads(p.read_text()) for p in tmp_path.glob("*/manifest.json")]
    errors = {m["largest_error"] for m in manifests if m.get("storage") == storage}
    assert len(errors) == 2
    said = [re.search(rf" as {storage}, off by at most ([^,]+),", line).group(1) for line in lines]
    assert sorted(said) == sorted(f"{error:.1e}" for error in errors)
    assert 1e-6 < (column(rows) - column(plain)).abs().max() < 0.1


def test_the_bar_says_which_teacher_it_is(tmp_path, monkeypatch):
    import tqdm.auto

    names, tqdm_class = [], tqdm.auto.tqdm

    def bar(*args, **kwargs):
        names.append(kwargs["desc"])
        return tqdm_class(*args, **kwargs)

    monkeypatch.setattr(tqdm.auto, "tqdm", bar)
    cached(tmp_path, TeacherEnsemble([make_teacher(1), make_teacher(7), make_teacher(8)]))
    assert names == ["Teacher logits (1 of 3)", "Teacher logits (2 of 3)", "Teacher logits (3 of 3)"]
    names.clear()
    cached(tmp_path, make_teacher(9))
    assert names == ["Teacher logits"]


# ---- described, not loaded ----


@pytest.fixture
def described(tmp_path):
    """Three checkpoints, and a function that describes them anew."""
    members = {"one": make_teacher(1), "two": permuted(make_teacher(7), [1, 2, 0]), "three": own_model(8)}
    for name, member in members.items():
        member.save_pretrained(tmp_path / name)

    def sources():
        return [
            TeacherSource(tmp_path / "one"),
            TeacherSource(str(tmp_path / "two"), restrict_labels=True, tokenizer=make_tokenizer()),
            TeacherSource(str(tmp_path / "three"), prefix="teacher_", tokenizer=own_tokenizer()),
        ]

    return members, sources


@pytest.mark.parametrize("mean", ["probabilities", "logits"])
def test_a_described_ensemble_gives_the_loaded_ones_column_and_is_not_loaded_again(
    tmp_path, described, monkeypatch, mean
):
    members, sources = described
    rows, loaded = own_rows(), []
    load = teacher_source.load_classifier
    monkeypatch.setattr(teacher_source, "load_classifier", lambda name, *r: loaded.append(name) or load(name, *r))
    settings = {"weights": [1, 2, 3], "mean": mean}
    lines = []
    found = cached_answers(sources(), rows, make_tokenizer(), tmp_path / "cache", say=lines.append, **settings)
    assert loaded == [str(tmp_path / name) for name in members]
    assert [line.split(" (")[0] for line in lines] == loaded
    ensemble = TeacherEnsemble(
        [
            members["one"],
            Teacher(members["two"], restrict_labels=True),
            Teacher(members["three"], own_tokenizer()),
        ],
        [1, 2, 3],
        mean,
    )
    in_memory, _ = cached(tmp_path / "other", ensemble, rows)
    assert found.to_list() == in_memory.to_list()
    again = cached_answers(sources(), rows, make_tokenizer(), tmp_path / "cache", say=lines.append, **settings)
    assert len(loaded) == 3
    assert again.to_list() == found.to_list()
    # In memory, the same members are served by the same folders.
    for member in members.values():
        member.register_forward_pre_hook(lambda *_: pytest.fail("a member was asked"))
    assert cached(tmp_path / "cache", ensemble, rows)[0].to_list() == found.to_list()


def test_only_the_member_that_lacks_rows_is_loaded_and_it_is_let_go(tmp_path, described, monkeypatch):
    _, sources = described
    rows, loaded = own_rows(), []
    cached_answers([sources()[1]], rows, make_tokenizer(), tmp_path / "cache")
    load = teacher_source.load_classifier
    monkeypatch.setattr(teacher_source, "load_classifier", lambda name, *r: loaded.append(name) or load(name, *r))
    used = sources()
    cached_answers(used, rows, make_tokenizer(), tmp_path / "cache")
    assert loaded == [str(tmp_path / "one"), str(tmp_path / "three")]
    assert all("model" not in vars(source) for source in used)


def test_one_described_teacher_answers_as_it_is(tmp_path, described):
    members, sources = described
    rows = own_rows()
    found = cached_answers([sources()[2]], rows, None, tmp_path / "cache", weights=[1.0])
    assert_close(column(found), alone(members["three"], rows, "teacher_"))


def test_a_model_in_memory_is_not_let_go(tmp_path):
    source = TeacherSource(make_teacher())
    model = source.model
    cached_answers([source], make_dataset(), make_tokenizer(), tmp_path)
    assert source.model is model


@pytest.mark.parametrize(
    ("count", "settings", "message"),
    [
        (0, {}, "at least one teacher is needed, got none"),
        (2, {"weights": [1, 2, 3]}, "an ensemble of 2 teachers needs as many weights, got 3"),
        (2, {"weights": [1, 0]}, "weights of an ensemble must be > 0, got 0"),
        (2, {"mean": "votes"}, "mean must be one of probabilities, logits, got 'votes'"),
        (2, {"states": [(1, "first")]}, "states are those of one teacher's layers"),
    ],
)
def test_bad_descriptions_are_refused(tmp_path, count, settings, message):
    sources = [TeacherSource(make_teacher(seed)) for seed in range(count)]
    with pytest.raises(ValueError, match=message):
        cached_answers(sources, make_dataset(), make_tokenizer(), tmp_path, **settings)


def test_no_rows_are_no_problem(tmp_path):
    members = [make_teacher(1), permuted(make_teacher(7), [1, 2, 0])]
    rows, _ = cached(tmp_path, TeacherEnsemble(members), make_dataset(2).select([]))
    assert len(rows) == 0
    assert "teacher_logits" in rows.column_names


# ---- training ----


def calm(seed, **changes):
    """Answers that are not so steep that the rounding of another padding would show."""
    config = bert_config(initializer_range=0.1, **changes)
    return seeded(seed, lambda: BertForSequenceClassification(config)).eval()


def calm_own(seed):
    return calm(seed, vocab_size=OTHER_VOCAB, pad_token_id=3)


def trained(make_trainer, name, teacher, data, losses, **settings):
    trainer = make_trainer(
        name,
        student=make_student(initializer_range=0.1),
        teacher=teacher,
        losses={n: make() for n, make in losses.items()},
        data=data,
        # Adam would turn the rounding of a gradient that is zero into whole steps.
        **({"optim": "sgd", "learning_rate": 0.05} | settings),
    )
    seeded(7, trainer.train)
    return step_logs(trainer), parameters_of(trainer.model)


def assert_same_training(live, stored):
    assert len(live[0]) == len(stored[0]) > 0
    for one, other in zip(live[0], stored[0], strict=True):
        for name in [name for name in one if name.startswith("loss")]:
            assert other[name] == pytest.approx(one[name], rel=1e-6, abs=1e-6), name
    assert largest_difference(live[1], stored[1]) < 1e-6


LOSSES = {"ce": CrossEntropyLoss, "kl": lambda: KLDivergenceLoss(2.0), "mse": LogitsMSELoss}


def ensembles():
    """The members' labels in other orders, one with more of them, one with tokens of its own."""
    wide = calm(8, **label_config(("extra", "positive", "negative", "neutral")))
    return {
        "plain": lambda: TeacherEnsemble([calm(1), calm(7)], [2, 1]),
        "logits": lambda: TeacherEnsemble([calm(1), calm(7)], [2, 1], "logits"),
        "one": lambda: TeacherEnsemble([calm(1)]),
        "turned": lambda: TeacherEnsemble([permuted(calm(1), [2, 0, 1]), calm(7)], [1, 3]),
        "wider": lambda: TeacherEnsemble([calm(1), Teacher(wide, restrict_labels=True)]),
        "own tokens": lambda: TeacherEnsemble([calm(1), Teacher(calm_own(7), own_tokenizer())]),
    }


@pytest.mark.parametrize("kind", list(ensembles()))
def test_train_on_a_cached_ensemble_is_train_live(make_trainer, tmp_path, kind):
    data = own_rows() if kind == "own tokens" else make_dataset(16, unlabeled=(1, 6))
    make = ensembles()[kind]
    settings = {"train_sampling_strategy": "random", "max_steps": 6}
    live = trained(make_trainer, "live", make(), data, LOSSES, **settings)
    rows, _ = cached(tmp_path / "cache", make(), data.shuffle(seed=4), batch_size=3)
    ensemble = make()
    rows, lines = cached(tmp_path / "cache", ensemble, data)
    assert all("100.0% there" in line for line in lines)
    stored = trained(make_trainer, "cached", CachedTeacher(ensemble.config), rows, LOSSES, **settings)
    assert_same_training(live, stored)


def test_train_on_a_cached_ensemble_of_wider_teachers_is_train_live(make_trainer, tmp_path):
    def make():
        labels = ("extra", "positive", "negative", "neutral")
        return TeacherEnsemble([Teacher(calm(s, **label_config(labels)), restrict_labels=True) for s in (1, 7)])

    data, config = make_dataset(16), make_student().config
    live = trained(make_trainer, "live", make(), data, LOSSES)
    rows, _ = cached(tmp_path / "cache", make(), data, student_config=config)
    assert_same_training(live, trained(make_trainer, "cached", CachedTeacher(config), rows, LOSSES))


@pytest.mark.parametrize("losses", [LOSSES, {"pkd": lambda: PKDLoss(layers=[[1, 2], [2, 4]])}], ids=["logits", "pkd"])
def test_train_on_a_cached_teacher_of_other_tokens_is_train_live(make_trainer, tmp_path, losses):
    data = own_rows()
    live = trained(make_trainer, "live", Teacher(calm_own(1), own_tokenizer()), data, losses)
    states = [(2, "first"), (4, "first")] if "pkd" in losses else []
    rows, _ = cached(tmp_path, Teacher(calm_own(1), own_tokenizer()), data, batch_size=3, states=states)
    tokens = [c for c in data.column_names if c.startswith("teacher_")]
    stored = trained(make_trainer, "cached", CachedTeacher(calm_own(1).config), rows.remove_columns(tokens), losses)
    assert_same_training(live, stored)
