"""Several teachers as one: the mean against numbers by hand, labels by name, tokens of their own, training."""

import copy
import math

import pytest
import torch
from helpers import (
    LABELS,
    label_config,
    make_batch,
    make_dataset,
    make_student,
    make_teacher,
    make_tokenizer,
    reference_kl,
    step_logs,
)
from test_teacher import bound_objective, permuted

from distill_nlp import HiddenStateLoss, KLDivergenceLoss, RKDDistanceLoss
from distill_nlp.ensemble import TeacherEnsemble, mean_logits
from distill_nlp.teacher import CachedTeacher, Teacher


def softmax(row):
    top = max(row)
    values = [math.exp(x - top) for x in row]
    return [value / sum(values) for value in values]


def bound(ensemble, student=None):
    student = student or make_student()
    return ensemble.bind(student.config, bound_objective(student, ensemble))


LOGITS = [[[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]], [[-1.0, 0.0, 1.0], [4.0, 1.0, 0.0]], [[0.3, 0.2, 0.1], [1.0, 1.0, 1.0]]]
WEIGHTS = [0.5, 0.3, 0.2]


def test_the_mean_of_probabilities_is_that_of_softmaxes():
    found = mean_logits([torch.tensor(x) for x in LOGITS], WEIGHTS, "probabilities", "single_label_classification")
    for row in range(2):
        expected = [sum(w * softmax(x[row])[c] for w, x in zip(WEIGHTS, LOGITS, strict=True)) for c in range(3)]
        assert found[row].softmax(-1).tolist() == pytest.approx(expected, rel=1e-6)
        assert found[row].exp().sum().item() == pytest.approx(1, rel=1e-6)


def test_the_mean_of_multi_label_probabilities_is_that_of_sigmoids():
    found = mean_logits([torch.tensor(x) for x in LOGITS], WEIGHTS, "probabilities", "multi_label_classification")
    for row in range(2):
        for c in range(3):
            expected = sum(w / (1 + math.exp(-x[row][c])) for w, x in zip(WEIGHTS, LOGITS, strict=True))
            assert found[row, c].sigmoid().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("mean", "problem_type"),
    [
        ("logits", "single_label_classification"),
        ("logits", "multi_label_classification"),
        ("logits", "regression"),
        ("probabilities", "regression"),
    ],
)
def test_the_mean_of_logits_is_the_plain_one(mean, problem_type):
    found = mean_logits([torch.tensor(x) for x in LOGITS], WEIGHTS, mean, problem_type)
    for row in range(2):
        for c in range(3):
            expected = sum(w * x[row][c] for w, x in zip(WEIGHTS, LOGITS, strict=True))
            assert found[row, c].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_extreme_logits_stay_finite_and_bfloat16_comes_out_as_float32(problem_type):
    sure = torch.tensor([[1e4, -1e4, 0.0]], dtype=torch.bfloat16)
    for logits in ([sure, sure], [sure, -sure]):
        found = mean_logits(logits, [0.5, 0.5], "probabilities", problem_type)
        assert found.isfinite().all()
        assert found.dtype == torch.float32


def test_one_teacher_or_the_same_twice_answers_as_the_teacher_does():
    teacher, batch = make_teacher(), make_batch()
    plain = bound(Teacher(teacher))(batch).logits
    for members in ([teacher], [teacher, copy.deepcopy(teacher)]):
        torch.testing.assert_close(bound(TeacherEnsemble(members, mean="logits"))(batch).logits, plain)
        probabilities = bound(TeacherEnsemble(members))(batch).logits
        torch.testing.assert_close(probabilities.softmax(-1), plain.softmax(-1))


def test_weights_are_relative_and_a_heavy_member_decides():
    first, second, batch = make_teacher(seed=1), make_teacher(seed=7), make_batch()
    one, other = bound(TeacherEnsemble([first, second], [2, 6])), bound(TeacherEnsemble([first, second], [0.25, 0.75]))
    torch.testing.assert_close(one(batch).logits, other(batch).logits)
    heavy = bound(TeacherEnsemble([first, second], [1, 1e9]))(batch).logits
    torch.testing.assert_close(heavy.softmax(-1), bound(Teacher(second))(batch).logits.softmax(-1))


def test_members_may_have_their_labels_in_different_orders():
    first, second, batch = make_teacher(seed=1), make_teacher(seed=7), make_batch()
    plain = bound(TeacherEnsemble([first, second]))(batch).logits
    turned = bound(TeacherEnsemble([permuted(first, [2, 0, 1]), permuted(second, [1, 0, 2])]))(batch).logits
    torch.testing.assert_close(turned, plain)


def test_without_a_students_config_the_first_members_labels_are_agreed_on():
    first, second, batch = make_teacher(seed=1), make_teacher(seed=7), make_batch()
    objective = bound_objective(make_student(), first)
    plain = TeacherEnsemble([first, second]).bind(None, objective)(batch).logits
    turned = TeacherEnsemble([first, permuted(second, [1, 2, 0])]).bind(None, objective)(batch).logits
    torch.testing.assert_close(turned, plain)


def test_other_labels_of_a_member_are_refused():
    strange = make_teacher()
    for key, value in label_config(["x", "y", "z"]).items():
        setattr(strange.config, key, value)
    with pytest.raises(ValueError, match="do not match by name"):
        bound(TeacherEnsemble([make_teacher(), strange]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "at least one teacher"),
        (([make_teacher()], [1, 2]), "an ensemble of 1 teachers needs as many weights, got 2"),
        (([make_teacher()], [0]), "weights of an ensemble must be > 0, got 0"),
        (([make_teacher()], [float("nan")]), "must be > 0, got nan"),
        (([make_teacher()], None, "votes"), "mean must be one of probabilities, logits, got 'votes'"),
        (([CachedTeacher(make_teacher().config)],), "members of an ensemble are models or Teachers, got CachedTeacher"),
        (
            ([Teacher(make_teacher(), make_tokenizer()), Teacher(make_teacher(), make_tokenizer())],),
            'different tokenizers and one prefix, "teacher_"',
        ),
    ],
)
def test_bad_ensembles_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TeacherEnsemble(*arguments)


@pytest.mark.parametrize("loss", [HiddenStateLoss(), RKDDistanceLoss()])
def test_losses_that_read_layers_are_refused_by_name(make_trainer, loss):
    with pytest.raises(ValueError, match="losses inner read layers of the teacher, which an ensemble has not"):
        make_trainer(teacher=TeacherEnsemble([make_teacher(), make_teacher(7)]), losses={"inner": loss})


def test_train_with_an_ensemble_logs_the_kl_to_its_mean_and_moves_only_the_student(make_trainer):
    data, members = make_dataset(4), [make_teacher(seed=1), make_teacher(seed=7)]
    student = make_student(dropout=0.0)
    trainer = make_trainer(
        student=student,
        teacher=TeacherEnsemble(members, [3, 1]),
        losses={"kl": KLDivergenceLoss(2.0)},
        data=data,
        max_steps=1,
    )
    batch = make_batch(data)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        before = student.eval()(**inputs).logits
        types = batch["token_type_ids"]
        answers = [member(**inputs, token_type_ids=types).logits.softmax(-1) for member in members]
    states = [{k: v.clone() for k, v in member.state_dict().items()} for member in members]
    trainer.train()
    (entry,) = step_logs(trainer)
    assert entry["loss_kl"] == pytest.approx(
        reference_kl(before, (0.75 * answers[0] + 0.25 * answers[1]).log(), 2.0), rel=1e-4
    )
    for member, state in zip(members, states, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in member.state_dict().items())
    with torch.no_grad():
        assert not torch.equal(student.eval()(**inputs).logits, before)


def test_the_first_members_config_speaks_for_all():
    ensemble = TeacherEnsemble([make_teacher(), make_teacher(7)])
    assert ensemble.config.num_labels == len(LABELS)
    assert len(list(ensemble.parameters())) == 2 * len(list(make_teacher().parameters()))
    assert ensemble.accepted >= {"input_ids", "token_type_ids"}
    assert "labels" not in ensemble.accepted
