"""The weighted sum of the losses."""

import pytest
import torch
from helpers import features
from torch import nn

from distill_nlp import CrossEntropyLoss, DistillationObjective, HiddenStateLoss, KLDivergenceLoss
from distill_nlp.losses import AttentionLoss, DistillationLoss, ModelShape

STUDENT = ModelShape(num_labels=3, num_layers=2, hidden_size=4, num_attention_heads=2)
TEACHER = ModelShape(num_labels=3, num_layers=4, hidden_size=6, num_attention_heads=3)


class ScaleLoss(DistillationLoss):
    """`factor · mean(student logits)`."""

    def __init__(self, factor, unit="rows", needs_teacher=True):
        super().__init__()
        self.factor, self.unit, self.needs_teacher = factor, unit, needs_teacher

    def forward(self, student, teacher, labels, attention_mask):
        return self.factor * student.logits.float().mean()


def ones():
    return features(torch.ones(2, 3, requires_grad=True))


def test_total_is_the_weighted_sum_and_terms_are_unweighted_and_detached():
    objective = DistillationObjective({"a": ScaleLoss(2.0), "b": ScaleLoss(5.0)}, {"a": 0.25, "b": 3})
    total, terms = objective(ones(), None)
    assert total.item() == pytest.approx(0.25 * 2 + 3 * 5)
    assert {name: value.item() for name, value in terms.items()} == {"a": 2.0, "b": 5.0}
    assert total.requires_grad
    assert not any(value.requires_grad for value in terms.values())


def test_a_weight_that_is_not_given_is_one():
    objective = DistillationObjective({"a": ScaleLoss(2.0), "b": ScaleLoss(5.0)}, {"a": 0.5})
    assert objective.weights == {"a": 0.5, "b": 1.0}
    assert DistillationObjective({"a": ScaleLoss(2.0)}).weights == {"a": 1.0}


def test_weight_zero_leaves_the_loss_out_with_its_projections():
    losses = {"kl": KLDivergenceLoss(), "hidden": HiddenStateLoss(), "ce": CrossEntropyLoss()}
    objective = DistillationObjective(losses, {"hidden": 0, "kl": 0.5})
    objective.bind(STUDENT, TEACHER)
    assert list(objective.losses) == ["kl", "ce"]
    assert not list(objective.parameters())
    assert objective.layers(0, "hidden_state") == set()
    _, terms = objective(features(torch.randn(2, 3)), features(torch.randn(2, 3)), torch.tensor([0, 1]))
    assert set(terms) == {"kl", "ce"}


def test_projections_are_parameters_of_the_objective():
    objective = DistillationObjective({"hidden": HiddenStateLoss(), "kl": KLDivergenceLoss()})
    objective.bind(STUDENT, TEACHER)
    names = {f"losses.hidden.projections.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    assert {name for name, _ in objective.named_parameters()} == names == set(objective.state_dict())


def test_names_the_layers_that_the_losses_read():
    objective = DistillationObjective(
        {
            "hidden": HiddenStateLoss(layers=[[0, 0], [2, 3]]),
            "cosine": HiddenStateLoss(layers="last", kind="cosine"),
            "attention": AttentionLoss(layers=[[1, 4]]),
        }
    )
    objective.bind(STUDENT, TEACHER)
    assert objective.layers(0, "hidden_state") == {0, 2}
    assert objective.layers(1, "hidden_state") == {0, 3, 4}
    assert objective.layers(0, "attention") == {1}
    assert objective.layers(1, "attention") == {4}


def test_shares_scale_each_loss_by_its_unit():
    objective = DistillationObjective({"a": ScaleLoss(2.0), "b": ScaleLoss(5.0, "labeled_rows")}, {"b": 10})
    total, terms = objective(ones(), None, shares={"rows": torch.tensor(0.5), "labeled_rows": torch.tensor(0.1)})
    assert terms["a"].item() == pytest.approx(1.0)
    assert terms["b"].item() == pytest.approx(0.5)
    assert total.item() == pytest.approx(1.0 + 10 * 0.5)


def test_losses_are_computed_outside_autocast():
    class MatmulLoss(DistillationLoss):
        def forward(self, student, teacher, labels, attention_mask):
            return (student.logits @ student.logits.T).mean()

    logits = torch.randn(64, 3)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = DistillationObjective({"matmul": MatmulLoss()})(features(logits), None)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx((logits @ logits.T).mean().item(), rel=1e-5)


def test_needs_a_teacher_if_one_loss_of_some_weight_does():
    losses = {"ce": CrossEntropyLoss(), "kl": KLDivergenceLoss()}
    assert DistillationObjective(losses).needs_teacher
    assert not DistillationObjective(losses, {"kl": 0}).needs_teacher


def test_formula_is_one_line_with_weights_settings_and_layers():
    objective = DistillationObjective(
        {"ce": CrossEntropyLoss(), "kl": KLDivergenceLoss(4), "hidden": HiddenStateLoss(), "off": ScaleLoss(1.0)},
        {"ce": 0.3, "kl": 0.7, "off": 0},
    )
    objective.bind(STUDENT, TEACHER)
    assert objective.formula() == "0.3·ce + 0.7·kl(T=4) + 1·hidden(mse, 1→2, 2→4)"


@pytest.mark.parametrize(
    ("losses", "weights", "message"),
    [
        ({}, None, "losses is empty; give at least one"),
        ({"kl": KLDivergenceLoss()}, {"ce": 1.0}, "loss_weights names 'ce', which is not among the losses: kl"),
        ({"kl": KLDivergenceLoss()}, {"kl": -1}, r"loss_weights\['kl'\] must be a finite number >= 0, got -1"),
        ({"kl": KLDivergenceLoss()}, {"kl": float("nan")}, "must be a finite number >= 0, got nan"),
        ({"kl": KLDivergenceLoss()}, {"kl": float("inf")}, "must be a finite number >= 0, got inf"),
        ({"kl": KLDivergenceLoss()}, {"kl": "1e-4"}, "must be a finite number >= 0, got '1e-4'"),
        ({"kl": KLDivergenceLoss()}, {"kl": 0}, "all loss weights are 0"),
        ({"my.kl": KLDivergenceLoss()}, None, "a loss's name must be letters, digits and underscores, .* got 'my.kl'"),
        ({"values": KLDivergenceLoss()}, None, "and no attribute of a module, got 'values'"),
        ({"kl": nn.MSELoss()}, None, r"losses\['kl'\] must be a DistillationLoss, got MSELoss"),
        ({"kl": KLDivergenceLoss}, None, r"losses\['kl'\] must be a DistillationLoss"),
    ],
)
def test_refuses_what_makes_no_objective(losses, weights, message):
    with pytest.raises(ValueError, match=message):
        DistillationObjective(losses, weights)


def test_the_name_of_the_loss_stands_before_what_it_refused():
    objective = DistillationObjective({"hidden": HiddenStateLoss(projection="none")})
    with pytest.raises(ValueError, match=r"^losses\.hidden: projection \"none\" needs equal widths"):
        objective.bind(STUDENT, TEACHER)


def test_the_weights_that_were_given_are_not_changed():
    weights = {"a": 0.5}
    DistillationObjective({"a": ScaleLoss(1.0), "b": ScaleLoss(1.0)}, weights)
    assert weights == {"a": 0.5}
