"""Weights that follow the gradients."""

import math

import pytest
import torch

from distill_nlp.balancing import GradientBalance


def norms(**values):
    return {name: torch.tensor(float(value)) for name, value in values.items()}


def update(balance, found, weights):
    balance.observe(found)
    balance.apply(weights)


def factors(balance):
    return dict(zip(balance.names, balance.factors.tolist(), strict=True))


def test_weighted_norms_are_in_the_ratio_of_the_weights_and_keep_their_sum():
    balance = GradientBalance(["a", "b", "c"])
    weights, found = {"a": 1.0, "b": 2.0, "c": 0.5}, {"a": 3.0, "b": 0.1, "c": 40.0}
    update(balance, norms(**found), weights)
    weighted = {name: weights[name] * factors(balance)[name] * found[name] for name in weights}
    assert weighted["b"] / weighted["a"] == pytest.approx(2.0)
    assert weighted["c"] / weighted["a"] == pytest.approx(0.5)
    assert sum(weighted.values()) == pytest.approx(sum(weights[name] * found[name] for name in weights))


def test_norms_are_smoothed_in_logarithms():
    balance = GradientBalance(["a", "b"])
    weights = {"a": 1.0, "b": 1.0}
    update(balance, norms(a=1, b=1), weights)
    assert factors(balance) == {"a": 1.0, "b": 1.0}
    update(balance, norms(a=1, b=math.e), weights)
    smoothed = math.exp(0.1)
    assert factors(balance)["a"] / factors(balance)["b"] == pytest.approx(smoothed, rel=1e-5)


@pytest.mark.parametrize("norm", [0.0, math.inf, math.nan])
def test_a_gradient_that_is_zero_or_not_finite_changes_nothing(norm):
    balance = GradientBalance(["a", "b"])
    update(balance, norms(a=1, b=norm), {"a": 1.0, "b": 1.0})
    assert factors(balance) == {"a": 1.0, "b": 1.0}
    update(balance, norms(a=2, b=8), {"a": 1.0, "b": 1.0})
    before = factors(balance)
    update(balance, norms(b=norm), {"a": 1.0, "b": 1.0})
    assert factors(balance) == before
    assert all(math.isfinite(factor) for factor in before.values())


def test_a_term_that_was_not_measured_or_weighs_nothing_keeps_its_factor():
    balance = GradientBalance(["a", "b", "c"])
    update(balance, norms(a=1, b=4, c=16), {"a": 1.0, "b": 1.0, "c": 1.0})
    before = factors(balance)
    update(balance, norms(a=1, b=4), {"a": 1.0, "b": 1.0, "c": 0.0})
    assert factors(balance)["c"] == before["c"]
    assert factors(balance)["a"] == pytest.approx(2.5)
    assert factors(balance)["b"] == pytest.approx(0.625)


def test_without_any_usable_norm_the_factors_stay():
    balance = GradientBalance(["a", "b"])
    update(balance, norms(a=0, b=math.nan), {"a": 1.0, "b": 1.0})
    assert factors(balance) == {"a": 1.0, "b": 1.0}


def test_its_state_goes_on_where_it_was_saved():
    first, second = GradientBalance(["a", "b"]), GradientBalance(["a", "b"])
    weights = {"a": 1.0, "b": 2.0}
    update(first, norms(a=1, b=5), weights)
    second.load_state_dict(first.state_dict())
    for balance in (first, second):
        update(balance, norms(a=2, b=3), weights)
    assert factors(first) == factors(second)


def test_norms_count_only_when_they_are_applied():
    balance = GradientBalance(["a", "b"])
    balance.observe(norms(a=1, b=4))
    assert factors(balance) == {"a": 1.0, "b": 1.0}
    held = balance.factors
    balance.apply({"a": 1.0, "b": 1.0})
    assert factors(balance) == {"a": 2.5, "b": 0.625}
    # A graph that was built before still has what it was built with.
    assert held.tolist() == [1.0, 1.0]
