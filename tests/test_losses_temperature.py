"""Temperatures: a number, a schedule, or one per row by the formulas of Dynamic Temperature Distillation."""

import numpy as np
import pytest
import torch
from helpers import numeric_gradient
from references_logits import (
    MULTI_LABEL,
    bound,
    call,
    gradient_of,
    random_logits,
    reference_cwsm,
    reference_decoupled,
    reference_dist,
    reference_flsw,
    reference_softened,
)

from distill_nlp.losses import DecoupledKDLoss, DISTLoss, KLDivergenceLoss
from distill_nlp.losses.temperature import Temperature

LINEAR = {"schedule": "linear", "start": 8, "end": 2}
FLSW = {"schedule": "flsw", "value": 4, "beta": 1.5, "gamma": 1.2}
CWSM = {"schedule": "cwsm", "value": 4, "beta": 0.8}
PER_ROW = pytest.mark.parametrize("setting", [FLSW, CWSM], ids=["flsw", "cwsm"])


def reference_temperatures(setting, student, teacher):
    value, beta = setting["value"], setting.get("beta", 1.0)
    if setting["schedule"] == "flsw":
        return reference_flsw(student, teacher, value, beta, setting.get("gamma", 1.0))
    return reference_cwsm(student, value, beta)


def temperatures_of(setting, student, teacher):
    return Temperature(setting)(student, teacher)[:, 0].double().tolist()


def test_a_number_is_the_same_for_all_rows_at_all_times():
    temperature = Temperature(3)
    assert temperature(random_logits(0), random_logits(1)) == 3.0
    temperature.set_progress(0.7)
    assert temperature(random_logits(0), random_logits(1)) == 3.0


def test_a_schedule_follows_the_progress():
    temperature, logits = Temperature(LINEAR), random_logits(0)
    assert temperature(logits, logits) == 8.0
    for progress, expected in ((0.5, 5.0), (1.0, 2.0), (0.25, 6.5)):
        temperature.set_progress(progress)
        assert temperature(logits, logits) == pytest.approx(expected)


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_the_losses_take_the_temperature_of_the_moment(progress):
    now = 8 - 6 * progress
    student, teacher, labels = random_logits(0), random_logits(1), torch.tensor([0, 1, 2, 1, 0])
    for loss, expected in (
        (KLDivergenceLoss(LINEAR), reference_softened("kl", student, teacher, now)),
        (DecoupledKDLoss(LINEAR), reference_decoupled(student, teacher, labels.tolist(), now, 1.0, 8.0)),
        (DISTLoss(LINEAR), reference_dist(student, teacher, now)),
    ):
        bound(loss).set_progress(progress)
        assert call(loss, student, teacher, labels).item() == pytest.approx(expected, rel=1e-4), type(loss).__name__


@PER_ROW
def test_per_row_equals_the_published_formula(setting):
    student, teacher = (random_logits(seed, dtype=torch.float64) for seed in (0, 1))
    expected = reference_temperatures(setting, student, teacher)
    assert temperatures_of(setting, student, teacher) == pytest.approx(expected, rel=1e-12)
    assert max(expected) - min(expected) > 0.2


@pytest.mark.parametrize("setting", [{"schedule": "flsw", "value": 4}, {"schedule": "cwsm", "value": 4}])
def test_beta_and_gamma_are_one_unless_given(setting):
    student, teacher = random_logits(0), random_logits(1)
    expected = reference_temperatures(setting, student, teacher)
    assert temperatures_of(setting, student, teacher) == pytest.approx(expected, rel=1e-5)


@PER_ROW
def test_the_mean_over_the_rows_is_the_value(setting):
    assert np.mean(temperatures_of(setting, random_logits(0), random_logits(1))) == pytest.approx(4, rel=1e-6)
    assert temperatures_of(setting, random_logits(0, 1), random_logits(1, 1)) == [4.0]


def test_flsw_is_sharper_where_the_student_disagrees():
    teacher = torch.tensor([[3.0, 0, 0], [3.0, 0, 0]])
    agrees, disagrees = temperatures_of(FLSW, torch.tensor([[2.0, 0, 0], [-2.0, 0, 0]]), teacher)
    assert disagrees < 4 < agrees


def test_cwsm_is_sharper_where_the_student_is_unsure_whatever_the_teacher_says():
    student = torch.tensor([[6.0, 0, 0], [0.1, 0, 0]])
    sure, unsure = temperatures_of(CWSM, student, random_logits(1, 2))
    assert unsure < 4 < sure
    assert temperatures_of(CWSM, student, random_logits(2, 2)) == [sure, unsure]


def test_flsw_sees_the_direction_of_the_logits_only():
    student, teacher, factors = random_logits(0), random_logits(1), torch.tensor([[0.5], [2], [9], [1], [30]])
    expected = temperatures_of(FLSW, student, teacher)
    assert temperatures_of(FLSW, student * factors, teacher * factors.flip(0)) == pytest.approx(expected, rel=1e-5)


def test_the_same_answer_in_every_row_leaves_the_value():
    logits = random_logits(0)
    assert temperatures_of(FLSW, logits, logits) == pytest.approx([4.0] * 5, rel=1e-5)
    assert temperatures_of(CWSM, logits[:1].repeat(5, 1), logits) == pytest.approx([4.0] * 5, rel=1e-6)


@PER_ROW
@pytest.mark.parametrize("loss", [KLDivergenceLoss, DecoupledKDLoss])
def test_each_row_is_softened_and_scaled_by_its_own_temperature(setting, loss):
    """T² too is each row's own; no gradient flows through the temperatures."""
    student, teacher, labels = random_logits(0).requires_grad_(), random_logits(1), torch.tensor([0, 1, 2, -100, 0])
    each = reference_temperatures(setting, student, teacher)

    def reference(z):
        if loss is KLDivergenceLoss:
            return reference_softened("kl", z, teacher, each)
        return reference_decoupled(z, teacher, labels.tolist(), each, 1.0, 8.0)

    value = call(bound(loss(setting)), student, teacher, labels)
    assert value.item() == pytest.approx(reference(student), rel=1e-4)
    np.testing.assert_allclose(gradient_of(value, student), numeric_gradient(reference, student), atol=1e-5)


@PER_ROW
def test_the_order_of_the_rows_changes_nothing(setting):
    student, teacher, order = random_logits(0), random_logits(1), torch.tensor([3, 0, 4, 2, 1])
    loss = bound(KLDivergenceLoss(setting))
    value = call(loss, student, teacher).item()
    assert call(loss, student[order], teacher[order]).item() == pytest.approx(value, rel=1e-6)


@PER_ROW
def test_standardizing_leaves_the_temperatures_of_the_logits_as_they_are(setting):
    student, teacher = random_logits(0), random_logits(1)
    each = reference_temperatures(setting, student, teacher)
    value = call(bound(KLDivergenceLoss(setting, standardize=True)), student, teacher)
    assert value.item() == pytest.approx(reference_softened("kl", student, teacher, each, standardize=True), rel=1e-5)


@PER_ROW
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_finite_with_a_teacher_without_gradient(setting, scale, dtype):
    student = (random_logits(0).sign() * scale).to(dtype).requires_grad_()
    teacher = (random_logits(1) * scale).to(dtype).requires_grad_()
    value = call(bound(KLDivergenceLoss(setting)), student, teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert teacher.grad is None


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_flsw_stays_finite_where_rounding_makes_the_cosine_exceed_one(gamma):
    logits = random_logits(0, rows=2000)
    setting = {"schedule": "flsw", "value": 4, "beta": 1, "gamma": gamma}
    assert torch.cosine_similarity(logits, 3 * logits, dim=1).max() > 1
    assert np.isfinite(temperatures_of(setting, logits, 3 * logits)).all()


def test_no_row_reaches_zero_with_the_greatest_beta_that_is_taken():
    teacher = torch.tensor([[9.0, -9, 0]]).repeat(64, 1)
    student = teacher.clone()
    student[0] *= -1
    flsw = {"schedule": "flsw", "value": 4, "beta": 0.999, "gamma": 2}
    assert min(temperatures_of(flsw, student, teacher)) > 0
    sure = torch.tensor([[90.0, 0, 0]]).repeat(64, 1)
    sure[0] = 0
    cwsm = {"schedule": "cwsm", "value": 4, "beta": 1.999}
    bound(KLDivergenceLoss(cwsm))
    assert min(temperatures_of(cwsm, sure, sure)) > 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (0.0, "temperature must be > 0, got 0.0"),
        ("4", "temperature must be > 0, got '4'"),
        ([4, 1], r"temperature must be > 0, got \[4, 1\]"),
        ({"schedule": "flws", "value": 4}, "must be one of constant, linear, .*, range, flsw, cwsm, got 'flws'"),
        ({"value": 4}, "temperature.schedule must be one of constant, .* got None"),
        ({"schedule": "flsw"}, "temperature: flsw needs value, the temperature to vary around"),
        ({"schedule": "cwsm"}, "temperature: cwsm needs value"),
        ({"schedule": "flsw", "value": 0}, "temperature.value must be > 0, got 0"),
        ({"schedule": "flsw", "value": LINEAR}, "temperature.value must be > 0, got {'schedule'"),
        ({"schedule": "flsw", "value": 4, "beta": -1}, "temperature.beta must be > 0, got -1"),
        ({"schedule": "flsw", "value": 4, "gamma": 0}, "temperature.gamma must be > 0, got 0"),
        ({"schedule": "flsw", "value": 4, "until": 0.5}, "flsw takes beta, gamma, schedule, value, not 'until'"),
        ({"schedule": "cwsm", "value": 4, "gamma": 1}, "cwsm takes beta, schedule, value, not 'gamma'"),
        ({"schedule": "linear", "start": 8}, "temperature: schedule linear needs end"),
        ({"schedule": "linear", "start": 8, "end": 0}, r"temperature must be > 0, but \[8→0 linear\] reaches 0$"),
        ({"schedule": "cosine", "start": -1, "end": 2}, r"temperature must be > 0, but \[-1→2 cosine\] reaches -1$"),
        ({"schedule": "constant", "value": 0}, "temperature must be > 0, but 0 reaches 0$"),
        (
            {"schedule": "range", "value": 4, "until": 0.3},
            r"temperature must be > 0, but \[4 in 0..0.3\] reaches 0; a range is 0 elsewhere unless outside is given",
        ),
    ],
)
def test_refuses_what_is_not_always_above_zero_and_unknown_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        Temperature(setting)


def test_a_range_with_a_temperature_outside_is_taken():
    temperature, logits = Temperature({"schedule": "range", "value": 4, "until": 0.3, "outside": 1}), random_logits(0)
    assert temperature(logits, logits) == 4
    temperature.set_progress(0.3)
    assert temperature(logits, logits) == 1


@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_flsw_refuses_a_beta_that_could_reach_zero(gamma):
    limit = 4 / 2**gamma
    setting = {"schedule": "flsw", "value": 4, "gamma": gamma}
    assert Temperature(setting | {"beta": limit * 0.99}).beta == limit * 0.99
    with pytest.raises(ValueError, match=f"could reach zero; beta must be below {limit:g}"):
        Temperature(setting | {"beta": limit})


@pytest.mark.parametrize("loss", [KLDivergenceLoss, DecoupledKDLoss])
def test_cwsm_refuses_a_beta_that_could_reach_zero_with_so_many_classes(loss):
    bound(loss({"schedule": "cwsm", "value": 4, "beta": 1}), 4)
    with pytest.raises(ValueError, match="cwsm with value 4 and beta 1 could reach zero; beta must be below 1$"):
        bound(loss({"schedule": "cwsm", "value": 4, "beta": 1}), 5)


@PER_ROW
def test_per_row_is_refused_for_multi_label(setting):
    with pytest.raises(ValueError, match=f"temperature: {setting['schedule']} is defined for single-label tasks only"):
        bound(KLDivergenceLoss(setting), 3, MULTI_LABEL)


def test_is_written_as_it_was_set():
    assert str(Temperature(2)) == "2"
    assert str(Temperature(LINEAR)) == "[8→2 linear]"
    assert str(Temperature(FLSW)) == "[4 flsw β=1.5, γ=1.2]"
    assert str(Temperature(CWSM)) == "[4 cwsm β=0.8]"
    assert DecoupledKDLoss(CWSM).describe() == "T=[4 cwsm β=0.8], α=1, β=8"
