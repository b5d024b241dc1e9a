"""The student and its objective as one module."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from helpers import all_losses, make_batch, make_student, make_teacher, seeded
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from distill_nlp import CrossEntropyLoss, DistillationModel, DistillationObjective, HiddenStateLoss, KLDivergenceLoss
from distill_nlp.modeling import accepted_arguments, autocast_of
from distill_nlp.outputs import DistillationOutput, Features


def make_model(losses=None, student=None):
    objective = DistillationObjective(losses or {"ce": CrossEntropyLoss(), "hidden": HiddenStateLoss()})
    return seeded(5, lambda: DistillationModel(student or make_student(0.0), objective, make_teacher().config))


def test_projections_are_its_parameters_and_the_student_is_whole():
    model = make_model()
    student, objective = model.split_state_dict(model.state_dict())
    assert student.keys() == model.student.state_dict().keys()
    assert set(objective) == {f"losses.hidden.projections.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    assert len(list(model.parameters())) == len(list(model.student.parameters())) + 4


def test_in_evaluation_it_is_the_student_and_needs_no_teacher():
    # In float64: ours is a sum over a count, whose last bit in float32 is another one on some CPUs.
    model = make_model().double().eval()
    batch = make_batch()
    output = model(**batch)
    expected = model.student(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
    )
    assert isinstance(output, DistillationOutput)
    assert torch.equal(output.logits, expected.logits)
    assert output.loss.dtype == torch.float64
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-14, atol=0)
    assert list(output) == ["loss", "logits"]
    del batch["labels"]
    assert list(model(**batch)) == ["logits"]


@pytest.mark.parametrize(
    ("kind", "precision", "expected"),
    [
        (DistributedType.DEEPSPEED, "bf16", torch.bfloat16),
        (DistributedType.DEEPSPEED, "fp16", torch.float16),
        (DistributedType.DEEPSPEED, "no", None),
        (DistributedType.NO, "bf16", torch.bfloat16),
    ],
)
def test_a_model_beside_the_trained_one_has_its_precision(kind, precision, expected):
    """Under DeepSpeed, accelerate's own autocast does nothing, and a teacher would run in float32."""
    own = nullcontext() if kind == DistributedType.DEEPSPEED else torch.autocast("cpu", torch.bfloat16)
    like = SimpleNamespace(
        mixed_precision=precision, distributed_type=kind, device=torch.device("cpu"), autocast=lambda: own
    )
    with autocast_of(like):
        assert torch.is_autocast_enabled("cpu") == (expected is not None)
        assert expected is None or torch.get_autocast_dtype("cpu") == expected


def test_in_training_a_missing_teacher_is_refused():
    with pytest.raises(ValueError, match="the objective needs teacher=Features"):
        make_model().train()(**make_batch())


def test_losses_of_the_labels_alone_train_without_a_teacher():
    model = DistillationModel(make_student(dropout=0.0), DistillationObjective({"ce": CrossEntropyLoss()}))
    batch = make_batch()
    output = model.train()(**batch)
    expected = model.eval()(**batch)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert set(output.terms) == {"ce"}


def test_the_output_survives_being_rebuilt_by_keyword():
    """DDP does so, and knows only the declared keys."""
    output = DistillationOutput(loss=torch.ones(()), logits=torch.ones(1, 2), terms={"kl": torch.ones(())})
    assert type(output)(**dict(output.items())).terms.keys() == {"kl"}


def test_a_student_that_is_no_transformers_model_learns_from_logits():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = make_student().config
            self.embedding = nn.EmbeddingBag(100, 3)

        def forward(self, input_ids):
            return {"logits": self.embedding(input_ids)}

    model = make_model({"ce": CrossEntropyLoss(), "kl": KLDivergenceLoss()}, Bag())
    batch = make_batch()
    output = model.train()(teacher=Features(torch.randn(4, 3)), **batch)
    output.loss.backward()
    assert model.student.embedding.weight.grad.any()
    expected = nn.functional.cross_entropy(model.student(batch["input_ids"])["logits"], batch["labels"])
    assert model.eval()(**batch).loss.item() == pytest.approx(expected.item())
    del batch["labels"]
    assert model(**batch).loss is None
    with pytest.raises(ValueError, match=r"losses\.attention: .*|does not use Transformers' attention interface"):
        make_model({"attention": all_losses()["attention"]}, Bag())


def test_accepted_arguments_are_the_declared_ones():
    class Anything(nn.Module):
        def forward(self, **kwargs):
            pass

    assert "token_type_ids" in accepted_arguments(make_teacher())
    assert "token_type_ids" not in accepted_arguments(make_student())
    assert accepted_arguments(Anything()) is None


def test_what_the_trainer_asks_of_a_model_is_the_students():
    model = make_model()
    assert model.config is model.student.config
    assert model.main_input_name == "input_ids"
    assert model.num_parameters() == model.student.num_parameters()
    assert model._no_split_modules == model.student._no_split_modules
    assert not model.accepts_loss_kwargs


def test_segments_are_left_out_where_a_model_knows_one_alone():
    one = RobertaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, type_vocab_size=1)
    model = RobertaForSequenceClassification(one)
    assert "token_type_ids" not in accepted_arguments(model)
    assert "token_type_ids" not in accepted_arguments(RobertaForSequenceClassification, one)
    one.type_vocab_size = 2
    assert "token_type_ids" in accepted_arguments(RobertaForSequenceClassification(one))
