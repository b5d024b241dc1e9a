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
        ({"kl": KLDivergenceLoss()}, {"kl": -1}, r"loss_weights\['kl'\] must be >= 0, got -1"),
        ({"kl": KLDivergenceLoss()}, {"kl": float("nan")}, "must be a finite number, got nan"),
        ({"kl": KLDivergenceLoss()}, {"kl": float("inf")}, "must be a finite number, got inf"),
        ({"kl": KLDivergenceLoss()}, {"kl": "1e-4"}, "must be a finite number, got '1e-4'"),
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


# ---- weights that change ----


def scheduled(**weights):
    return DistillationObjective({name: ScaleLoss(2.0) for name in weights}, weights)


def test_a_scheduled_weight_follows_progress():
    objective = scheduled(a=1.0, b={"schedule": "linear", "start": 4.0, "end": 0.0})
    for progress, weight in ((0.0, 4.0), (0.25, 3.0), (0.5, 2.0)):
        objective.set_progress(progress)
        total, terms = objective(ones(), None)
        assert total.item() == pytest.approx(2.0 + 2.0 * weight)
        assert terms["b"].item() == 2.0
        assert {name: value.item() for name, value in objective.current_weights().items()} == {"b": weight}


def test_a_loss_is_not_computed_while_its_weight_is_zero_but_its_parameters_stay_in_the_graph():
    class Refusing(ScaleLoss):
        def __init__(self):
            super().__init__(1.0)
            self.projection = nn.Linear(2, 2)

        def forward(self, *args):
            raise RuntimeError("computed")

    weights = {"b": {"schedule": "range", "value": 1.0, "begin": 0.5}}
    objective = DistillationObjective({"a": ScaleLoss(2.0), "b": Refusing()}, weights)
    assert objective.active == ["a"]
    total, terms = objective(ones(), None)
    assert set(terms) == {"a"}
    total.backward()
    for parameter in objective.parameters():
        torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter), rtol=0, atol=0)
    objective.set_progress(0.5)
    assert objective.active == ["a", "b"]
    with pytest.raises(RuntimeError, match="computed"):
        objective(ones(), None)


@pytest.mark.parametrize("attribute", ["hidden_state_pairs", "attention_pairs"])
def test_the_logits_stay_in_the_graph_where_no_loss_reads_them(attribute):
    """The head would have no gradient at all, for which DDP waits."""
    loss = HiddenStateLoss(layers="last", projection="none")
    loss.bind(STUDENT, STUDENT)
    if attribute == "attention_pairs":
        loss = AttentionLoss(layers="last")
        loss.bind(STUDENT, STUDENT)
        loss.forward = lambda *args: torch.zeros(())
    logits, states = torch.randn(2, 3, requires_grad=True), torch.randn(2, 4, 4, requires_grad=True)
    student = features(logits, hidden_states={2: states})
    total, _ = DistillationObjective({"only": loss})(student, features(hidden_states={2: torch.zeros(2, 4, 4)}))
    total.backward()
    torch.testing.assert_close(logits.grad, torch.zeros(2, 3), rtol=0, atol=0)


def test_a_loss_whose_weight_is_always_zero_is_left_out():
    objective = scheduled(a=1.0, b={"schedule": "linear", "start": 0, "end": 0.0}, c=0)
    assert set(objective.losses) == {"a"}


def test_losses_hear_of_the_progress():
    objective = DistillationObjective({"kl": KLDivergenceLoss({"schedule": "linear", "start": 4.0, "end": 2.0})})
    objective.bind(STUDENT, TEACHER)
    student, teacher = features(torch.randn(2, 3)), features(torch.randn(2, 3))
    for progress, temperature in ((0.0, 4.0), (0.5, 3.0), (1.0, 2.0)):
        objective.set_progress(progress)
        plain = KLDivergenceLoss(temperature)
        assert objective(student, teacher)[0].item() == pytest.approx(plain(student, teacher, None, None).item())


def test_terms_keep_their_graph_on_demand():
    objective = scheduled(a=0.5)
    assert not objective(ones(), None)[1]["a"].requires_grad
    assert objective(ones(), None, keep_graph=True)[1]["a"].requires_grad


def test_formula_shows_schedules():
    objective = scheduled(
        a={"schedule": "range", "value": 2, "until": 0.3}, b={"schedule": "cosine", "start": 1, "end": 0}
    )
    assert objective.formula() == f"{objective.schedules['a']}·a + {objective.schedules['b']}·b"
    assert "0.3" in objective.formula()


def test_balance_scales_the_weights_and_is_saved_with_the_objective():
    objective = DistillationObjective({"a": ScaleLoss(2.0), "b": ScaleLoss(5.0)}, {"b": 3.0}, balance=True)
    assert {"balance.factors", "balance.log_norms"} <= objective.state_dict().keys()
    assert objective.formula().endswith("gradients balanced")
    objective.balance.observe({"a": torch.tensor(1.0), "b": torch.tensor(4.0)})
    objective.balance.apply(objective.weights)
    # G = (1·1 + 3·4) / (1 + 3)
    total, _ = objective(ones(), None)
    assert total.item() == pytest.approx(13 / 4 * 2 + 3 * 13 / 16 * 5)
    weights = {name: value.item() for name, value in objective.current_weights().items()}
    assert weights == {"a": pytest.approx(13 / 4), "b": pytest.approx(3 * 13 / 16)}


def test_a_single_term_has_nothing_to_be_balanced_against():
    assert DistillationObjective({"a": ScaleLoss(2.0)}, balance=True).balance is None


def test_the_weights_that_were_given_are_not_changed():
    weights = {"a": 0.5}
    DistillationObjective({"a": ScaleLoss(1.0), "b": ScaleLoss(1.0)}, weights)
    assert weights == {"a": 0.5}
