"""Numbers that change in the course of training."""

import math

import pytest

from distill_nlp.schedules import KINDS, Schedule, build_schedule

CURVES = ("linear", "cosine", "exponential")
EACH_CURVE = pytest.mark.parametrize("kind", CURVES)


def schedule(kind, name="weight", **settings):
    return build_schedule({"schedule": kind, **settings}, name)


def test_every_kind_is_known():
    assert ("constant", *CURVES, "range") == KINDS


@pytest.mark.parametrize("setting", [0.3, {"schedule": "constant", "value": 0.3}])
def test_a_number_is_constant(setting):
    built = build_schedule(setting, "weight")
    assert built.constant
    assert [built(progress) for progress in (0.0, 0.5, 1.0)] == [0.3] * 3
    assert (built.lowest, built.highest) == (0.3, 0.3)
    assert str(built) == "0.3"


def test_a_whole_number_becomes_a_float():
    assert isinstance(build_schedule(2, "weight")(0.0), float)


@pytest.mark.parametrize(
    ("kind", "quarter", "middle"),
    [
        ("linear", 6.5, 5.0),
        ("cosine", 2 + 6 * (1 + math.cos(math.pi / 4)) / 2, 5.0),
        ("exponential", 8 * 0.25**0.25, 4.0),
    ],
)
def test_curves_run_from_start_to_end(kind, quarter, middle):
    built = schedule(kind, start=8, end=2)
    assert [built(0.0), built(0.25), built(0.5), built(1.0)] == pytest.approx([8, quarter, middle, 2])
    rising = schedule(kind, start=2, end=8)
    assert [rising(0.0), rising(0.5), rising(1.0)] == pytest.approx([2, middle, 8])
    assert not built.constant


@EACH_CURVE
def test_curves_hold_their_ends_outside_begin_and_until(kind):
    whole, built = schedule(kind, start=8, end=2), schedule(kind, start=8, end=2, begin=0.2, until=0.6)
    assert [built(progress) for progress in (0.0, 0.1, 0.2)] == [8.0] * 3
    assert [built(progress) for progress in (0.6, 0.8, 1.0)] == [2.0] * 3
    for progress, part in ((0.3, 0.25), (0.4, 0.5), (0.5, 0.75)):
        assert built(progress) == pytest.approx(whole(part))


@EACH_CURVE
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.1), (0.1, 1.0), (8.0, 0.3), (1.0, 1e-17), (1e-17, 1.0)])
def test_curves_meet_both_ends_exactly(kind, start, end):
    """A temperature that is to end at a small number must not end at 0."""
    built = schedule(kind, start=start, end=end)
    assert (built(0.0), built(1.0)) == (start, end)
    assert (built(-0.5), built(1.5)) == (start, end)


@EACH_CURVE
@pytest.mark.parametrize(("start", "end"), [(8, 1), (0.5, 3)])
def test_curves_are_monotonic_between_lowest_and_highest(kind, start, end):
    built = schedule(kind, start=start, end=end, begin=0.1, until=0.9)
    values = [built(step / 50) for step in range(51)]
    assert values == sorted(values, reverse=start > end)
    assert (min(values), max(values)) == (built.lowest, built.highest) == (min(start, end), max(start, end))


def test_linear_and_cosine_may_reach_zero():
    for kind in ("linear", "cosine"):
        assert schedule(kind, start=1, end=0)(1.0) == 0.0
        assert schedule(kind, start=0, end=1)(0.0) == 0.0


def test_a_range_is_for_a_part_of_the_training():
    built = schedule("range", value=2, until=0.3)
    assert [built(progress) for progress in (0.0, 0.1, 0.299)] == [2.0] * 3
    assert [built(progress) for progress in (0.3, 0.5, 1.0)] == [0.0] * 3
    assert (built.lowest, built.highest) == (0.0, 2.0)


def test_a_range_has_a_value_outside():
    built = schedule("range", value=2, begin=0.25, until=0.5, outside=7)
    assert [built(progress) for progress in (0.0, 0.24, 0.25, 0.49, 0.5, 1.0)] == [7, 7, 2, 2, 7, 7]
    assert (built.lowest, built.highest) == (2.0, 7.0)


def test_a_range_to_the_end_still_holds_at_the_end():
    built = schedule("range", value=2, begin=0.5)
    assert [built(progress) for progress in (0.0, 0.499, 0.5, 1.0)] == [0, 0, 2, 2]
    assert (built.lowest, built.highest) == (0.0, 2.0)


def test_a_range_of_the_whole_training_is_never_outside():
    built = schedule("range", value=2, outside=9)
    assert [built(progress) for progress in (0.0, 0.5, 1.0)] == [2, 2, 2]
    assert (built.lowest, built.highest) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("kind", "settings", "text"),
    [
        ("constant", {"value": 4.0}, "4"),
        ("linear", {"start": 8, "end": 1}, "[8→1 linear]"),
        ("cosine", {"start": 1, "end": 0.05, "begin": 0.1}, "[1→0.05 cosine 0.1..1]"),
        ("exponential", {"start": 8, "end": 0.5, "until": 0.5}, "[8→0.5 exponential 0..0.5]"),
        ("range", {"value": 2}, "[2 in 0..1]"),
        ("range", {"value": 2, "until": 0.3}, "[2 in 0..0.3]"),
        ("range", {"value": 2, "begin": 1 / 3, "outside": 1}, "[2 in 0.333..1, else 1]"),
    ],
)
def test_is_written_in_a_few_characters(kind, settings, text):
    assert str(schedule(kind, **settings)) == text


def test_equal_settings_are_equal_schedules():
    assert schedule("linear", start=8, end=1) == Schedule("linear", 8.0, 1.0)
    assert schedule("range", value=2, until=0.3, outside=1) == Schedule("range", 2.0, 2.0, 0.0, 0.3, 1.0)
    assert build_schedule(2, "weight") == Schedule("constant", 2.0, 2.0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("1e-4", "loss_weights.kl must be a finite number, got '1e-4'"),
        (True, "loss_weights.kl must be a finite number, got True"),
        (None, "loss_weights.kl must be a finite number, got None"),
        ([1, 0], r"loss_weights.kl must be a finite number, got \[1, 0\]"),
        (float("nan"), "loss_weights.kl must be a finite number, got nan"),
        (float("-inf"), "loss_weights.kl must be a finite number, got -inf"),
        (
            {"schedule": "lineal", "start": 1, "end": 0},
            "loss_weights.kl: schedule must be one of constant, linear, cosine, exponential, range, got 'lineal'",
        ),
        ({"start": 1, "end": 0}, "loss_weights.kl: schedule must be one of .* got None"),
        ({"schedule": ["linear"]}, r"schedule must be one of .* got \['linear'\]"),
        ({"schedule": "linear", "start": 1}, "loss_weights.kl: schedule linear needs end"),
        ({"schedule": "cosine", "end": 1}, "loss_weights.kl: schedule cosine needs start"),
        ({"schedule": "exponential"}, "loss_weights.kl: schedule exponential needs end"),
        ({"schedule": "constant"}, "loss_weights.kl: schedule constant needs value"),
        ({"schedule": "range", "until": 0.3}, "loss_weights.kl: schedule range needs value"),
        (
            {"schedule": "linear", "value": 1},
            "loss_weights.kl: schedule linear takes begin, end, start, until, not 'value'",
        ),
        ({"schedule": "constant", "value": 1, "until": 1}, "schedule constant takes value, not 'until'"),
        ({"schedule": "range", "value": 1, "end": 1}, "range takes begin, outside, until, value, not 'end'"),
        ({"schedule": "cosine", "start": 1, "end": 0, "outside": 1}, "schedule cosine takes .*, not 'outside'"),
        ({"schedule": "linear", "start": "1", "end": 0}, "loss_weights.kl.start must be a finite number, got '1'"),
        ({"schedule": "linear", "start": 1, "end": None}, "loss_weights.kl.end must be a finite number, got None"),
        ({"schedule": "range", "value": 1, "until": "30%"}, "loss_weights.kl.until must be a finite number, got '30%'"),
        (
            {"schedule": "range", "value": 1, "until": 30},
            r"needs 0 <= begin < until <= 1 \(parts of the training\), got 0 and 30",
        ),
        ({"schedule": "linear", "start": 1, "end": 0, "begin": 0.5, "until": 0.5}, "got 0.5 and 0.5"),
        ({"schedule": "linear", "start": 1, "end": 0, "begin": 0.7, "until": 0.5}, "got 0.7 and 0.5"),
        ({"schedule": "linear", "start": 1, "end": 0, "begin": -0.1}, "got -0.1 and 1"),
        ({"schedule": "range", "value": 1, "begin": 1}, "got 1 and 1"),
        (
            {"schedule": "exponential", "start": 1, "end": 0},
            "loss_weights.kl: schedule exponential needs start and end > 0, got 1 and 0",
        ),
        ({"schedule": "exponential", "start": -1, "end": -2}, "needs start and end > 0, got -1 and -2"),
    ],
)
def test_refuses_what_is_no_schedule(setting, message):
    with pytest.raises(ValueError, match=message):
        build_schedule(setting, "loss_weights.kl")
