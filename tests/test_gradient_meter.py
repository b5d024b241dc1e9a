"""Gradient norms of the terms, and the steps in which they are taken."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distill_nlp import DistillationLoss, DistillationObjective
from distill_nlp.gradient_meter import GradientMeter, gradient_norms
from distill_nlp.terms import TermLog

ONE_PROCESS = SimpleNamespace(num_processes=1, scaler=None)


class ScaleLoss(DistillationLoss):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, student, teacher, labels, attention_mask):
        return self.factor * student.logits.mean()


def meter(every=0, balance=False, accelerator=ONE_PROCESS, **weights):
    objective = DistillationObjective({name: ScaleLoss(1.0) for name in weights}, weights, balance)
    return GradientMeter(objective, nn.Linear(2, 1), every, TermLog(), accelerator)


def due_steps(found, steps=6):
    result = []
    for step in range(steps):
        found.begin_step(step, steps)
        result.append(found.due)
    return result


def test_it_measures_every_so_many_steps():
    assert due_steps(meter(a=1.0, b=1.0)) == [False] * 6
    assert due_steps(meter(2, a=1.0, b=1.0)) == [True, False] * 3
    assert due_steps(meter(balance=True, a=1.0, b=1.0)) == [True] + [False] * 5


def test_with_balancing_a_term_that_begins_later_is_measured_in_its_first_step():
    late = {"schedule": "range", "value": 1.0, "begin": 0.5}
    assert due_steps(meter(balance=True, a=1.0, b=late)) == [True, False, False, True, False, False]
    early = {"schedule": "range", "value": 1.0, "until": 0.5}
    assert due_steps(meter(balance=True, a=1.0, b=early)) == [True, False, False, False, False, False]


def test_the_balance_moves_the_weights_from_the_next_step_on():
    found = meter(balance=True, a=1.0, b=1.0)
    layer = found.student
    found.begin_step(0, 10)
    value = layer(torch.ones(1, 2)).sum()
    found.take({"a": value, "b": 4 * value}, {"rows": torch.tensor(1.0)})
    assert found.objective.balance.factors.tolist() == [1.0, 1.0]
    assert not found.due
    found.begin_step(1, 10)
    assert found.objective.balance.factors.tolist() == pytest.approx([2.5, 0.625])


def test_nothing_is_taken_where_no_term_is_computed():
    found = meter(1, a={"schedule": "linear", "start": 0.0, "end": 1.0})
    found.begin_step(0, 10)
    found.take({}, None)
    assert not found.due
    assert found.log.read(lambda x: x) == {}


def test_shares_are_divided_out():
    found = meter(1, a=1.0)
    value = found.student(torch.ones(1, 2)).sum()
    found.begin_step(0, 10)
    found.log.add("a", torch.tensor(1.0))
    found.take({"a": value * 0.25}, {"rows": torch.tensor(0.25)})
    assert found.log.read(lambda x: x)["gradient_norm_a"] == pytest.approx(3**0.5, rel=1e-6)


def test_small_gradients_survive_float16():
    """On the way back through a float16 layer 1e-9 is zero, unless the loss scale of the training is on it."""

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, gradient):
            return gradient.half().float()

    scaled = SimpleNamespace(num_processes=1, scaler=SimpleNamespace(get_scale=lambda: 65536.0))
    norms = {}
    for name, accelerator in (("plain", ONE_PROCESS), ("scaled", scaled)):
        found = meter(1, accelerator=accelerator, a=1.0)
        found.begin_step(0, 10)
        found.log.add("a", torch.tensor(1.0))
        value = Half.apply(found.student(torch.ones(1, 2))).sum() * 1e-8
        found.take({"a": value}, None)
        norms[name] = found.log.read(lambda x: x)["gradient_norm_a"]
    assert norms["plain"] == 0
    assert norms["scaled"] == pytest.approx(1e-8 * 3**0.5, rel=1e-2)


def test_gradient_norms_are_those_of_each_term_alone():
    layer = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    terms = {"a": layer(x).square().mean(), "b": 5 * layer(x).abs().sum(), "constant": torch.tensor(1.0)}
    frozen = nn.Parameter(torch.ones(2))  # in no graph
    found = gradient_norms(terms, [*layer.parameters(), frozen])
    for name in ("a", "b"):
        layer.zero_grad()
        terms[name].backward(retain_graph=True)
        expected = torch.cat([p.grad.flatten() for p in layer.parameters()]).norm()
        assert found[name].item() == pytest.approx(expected.item(), rel=1e-6)
    assert found["constant"].item() == 0


def test_measuring_leaves_gradients_and_graph_alone():
    layer = nn.Linear(3, 1)
    value = layer(torch.randn(4, 3)).mean()
    gradient_norms({"a": value}, list(layer.parameters()))
    assert all(p.grad is None for p in layer.parameters())
    value.backward()
    assert layer.weight.grad.any()


def test_a_rank_without_rows_of_a_term_takes_nothing_from_its_norm():
    """Of two ranks one has no labeled row; the norm of the other is the norm, as in one process."""
    seen = []

    def reduce(x, reduction):
        assert reduction == "sum"
        seen.append(x)
        return x + torch.tensor([[0.0, 4.0], [0.0, 1.0]])

    found = meter(1, accelerator=SimpleNamespace(num_processes=2, scaler=None, reduce=reduce), a=1.0, b=1.0)
    found.begin_step(0, 10)
    value = found.student(torch.ones(1, 2)).sum()
    for name in ("a", "b"):
        found.log.add(name, torch.tensor(1.0))
    found.take({"a": value, "b": 2 * value}, None)
    norms = found.log.read(lambda x: x)
    here = 3**0.5
    assert norms["gradient_norm_a"] == pytest.approx(here, rel=1e-6)
    assert norms["gradient_norm_b"] == pytest.approx((2 * here + 4.0) / 2, rel=1e-6)
