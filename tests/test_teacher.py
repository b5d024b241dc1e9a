"""The teacher: its labels by name, always in eval, never trained, with the inputs that are its own."""

import copy

import pytest
import torch
from helpers import LABELS, label_config, make_batch, make_dataset, make_student, make_teacher, reference_kl, step_logs
from torch import nn
from transformers import BertConfig

from distill_nlp import DistillationObjective, HiddenStateLoss, KLDivergenceLoss
from distill_nlp.losses import ModelShape
from distill_nlp.teacher import Teacher, label_order


def config(labels):
    return BertConfig(**label_config(labels))


def bound_objective(student, teacher, **losses):
    objective = DistillationObjective(losses or {"kl": KLDivergenceLoss()})
    objective.bind(ModelShape.from_config(student.config), ModelShape.from_config(teacher.config))
    return objective


def wrap(teacher, student=None, **losses):
    student = student or make_student()
    return Teacher(teacher, student.config, bound_objective(student, teacher, **losses))


def permuted(teacher, order):
    """The same classifier with its classes in another order, and named so."""
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        other.classifier.weight.copy_(teacher.classifier.weight[order])
        other.classifier.bias.copy_(teacher.classifier.bias[order])
    for key, value in label_config([LABELS[i] for i in order]).items():
        setattr(other.config, key, value)
    return other


# ---- labels ----


@pytest.mark.parametrize(
    ("teacher", "student", "order"),
    [
        (["a", "b", "c"], ["a", "b", "c"], None),
        (["a", "b", "c"], ["c", "a", "b"], [2, 0, 1]),
        (["POSITIVE", "NEGATIVE"], ["negative", "positive"], [1, 0]),
        (["very-good", "so so"], ["So_So", "very_good"], [1, 0]),
        # A sign is a separator only where nothing else tells the labels apart.
        (["-1", "0", "1"], ["-1", "0", "1"], None),
        (["1", "0", "-1"], ["-1", "0", "1"], [2, 1, 0]),
        (["A-", "A"], ["A", "A-"], [1, 0]),
        # Digits are names too where both have the same ones in another order.
        (["1", "0"], ["0", "1"], [1, 0]),
        (["5", "4", "3"], ["3", "4", "5"], [2, 1, 0]),
        (["LABEL_1", "LABEL_0"], ["LABEL_0", "LABEL_1"], [1, 0]),
        # Anonymous ones are taken as they stand.
        (["LABEL_0", "LABEL_1"], ["negative", "positive"], None),
        (["negative", "positive"], ["LABEL_0", "LABEL_1"], None),
        (["0", "1"], ["LABEL_0", "LABEL_1"], None),
        (["same", "same"], ["same", "same"], None),
    ],
)
def test_labels_are_matched_by_name(teacher, student, order):
    assert label_order(config(teacher), config(student)) == order


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (["good", "bad"], ["positive", "negative"]),
        (["a", "b", "c"], ["a", "b", "d"]),
        # Alike without signs and case, so that nobody can say which is which.
        (["-1", "+1", "0"], ["- 1", "+ 1", "1"]),
        (["US", "us"], ["Us", "uS"]),
    ],
)
def test_other_names_are_refused_with_both_lists(teacher, student):
    with pytest.raises(ValueError, match="do not match by name; rename id2label") as error:
        label_order(config(teacher), config(student))
    assert str(teacher) in str(error.value)
    assert str(student) in str(error.value)


def test_another_number_of_labels_is_refused_with_both_lists():
    with pytest.raises(ValueError, match=r"the teacher has 2 labels \['a', 'b'\], the student 3 \['a', 'b', 'c'\]"):
        label_order(config(["a", "b"]), config(["a", "b", "c"]))


def test_logits_of_a_permuted_teacher_are_brought_into_the_students_order():
    teacher = make_teacher()
    plain, turned = wrap(teacher), wrap(permuted(teacher, [2, 0, 1]))
    batch = make_batch()
    torch.testing.assert_close(turned(batch).logits, plain(batch).logits, rtol=0, atol=1e-6)
    raw = turned.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert (raw - plain(batch).logits).abs().max() > 0.1


def test_train_with_a_permuted_teacher_is_the_same(make_trainer):
    teacher = make_teacher()
    plain = make_trainer("plain", teacher=teacher)
    turned = make_trainer("turned", teacher=permuted(teacher, [1, 2, 0]))
    for trainer in (plain, turned):
        trainer.train()
    for one, other in zip(step_logs(plain), step_logs(turned), strict=True):
        for name in ("loss", "loss_kl", "loss_hidden", "loss_attention"):
            assert other[name] == pytest.approx(one[name], rel=1e-5)


# ---- eval, no gradient ----


def test_is_in_eval_at_every_call_also_after_someone_called_train():
    """With a dropout of 0.5 two calls in train mode would not agree."""
    teacher = wrap(make_teacher(dropout=0.5))
    first = teacher(make_batch()).logits
    teacher.model.train()
    assert torch.equal(teacher(make_batch()).logits, first)
    assert not any(module.training for module in teacher.model.modules())


def test_is_frozen_and_gives_no_graph_but_tensors_that_autograd_may_save():
    teacher = wrap(make_teacher(), kl=KLDivergenceLoss(), hidden=HiddenStateLoss())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    found = teacher(make_batch())
    for tensor in (found.logits, *found.hidden_states.values()):
        assert not tensor.requires_grad
        assert not tensor.is_inference()


def test_is_no_module_so_that_nothing_registers_it():
    assert not isinstance(wrap(make_teacher()), nn.Module)


def test_keeps_only_the_layers_that_losses_read():
    found = wrap(make_teacher(), hidden=HiddenStateLoss(layers=[[0, 0], [2, 3]]))(make_batch())
    assert set(found.hidden_states) == {0, 3}
    assert found.attentions == {}


# ---- inputs ----


def test_token_types_reach_the_teacher_and_labels_do_not():
    teacher = wrap(make_teacher())
    batch = make_batch()
    assert batch["token_type_ids"].any()
    seen = {}
    teacher.model.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    found = teacher(batch | {"nonsense": torch.ones(4)})
    assert set(seen) == {"input_ids", "attention_mask", "token_type_ids"}
    without = teacher(batch | {"token_type_ids": torch.zeros_like(batch["token_type_ids"])})
    assert (found.logits - without.logits).abs().max() > 0.1


def test_logged_kl_is_that_of_a_teacher_that_saw_the_token_types(make_trainer):
    """Over a DistilBERT student, whose forward does not name them, the Trainer would drop the column."""
    dataset = make_dataset(4)
    student, teacher = make_student(dropout=0.0), make_teacher()
    trainer = make_trainer(
        student=student,
        teacher=teacher,
        losses={"kl": KLDivergenceLoss(2.0)},
        data=dataset,
        max_steps=1,
    )
    batch = make_batch(dataset)
    student_inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        student_logits = student.eval()(**student_inputs).logits
        with_types = teacher(**student_inputs, token_type_ids=batch["token_type_ids"]).logits
        without_types = teacher(**student_inputs).logits
    trainer.train()
    (entry,) = step_logs(trainer)
    assert entry["loss_kl"] == pytest.approx(reference_kl(student_logits, with_types, 2.0), rel=1e-4)
    assert abs(entry["loss_kl"] - reference_kl(student_logits, without_types, 2.0)) > 0.01


def test_a_teacher_that_takes_anything_gets_everything_but_the_labels():
    class Anything(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = make_student().config
            self.seen = None

        def forward(self, **inputs):
            self.seen = set(inputs)
            return {"logits": inputs["input_ids"][:, :3].float()}

    student = make_student()
    model = Anything()
    teacher = Teacher(model, student.config, bound_objective(student, model))
    assert teacher(make_batch()).logits.shape == (4, 3)
    assert model.seen == {"input_ids", "attention_mask", "token_type_ids"}
