"""The teacher: its labels by name, always in eval, never trained, with the inputs that are its own."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
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
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

from distill_nlp import DistillationObjective, HiddenStateLoss, KLDivergenceLoss, PKDLoss, RKDDistanceLoss
from distill_nlp.losses import ModelShape
from distill_nlp.teacher import Teacher
from distill_nlp.tokenization import tokenize


def bound_objective(student, teacher, **losses):
    objective = DistillationObjective(losses or {"kl": KLDivergenceLoss()})
    objective.bind(ModelShape.from_config(student.config), ModelShape.from_config(teacher.config))
    return objective


def wrap(teacher, student=None, **losses):
    student = student or make_student()
    return Teacher(teacher).bind(student.config, bound_objective(student, teacher, **losses))


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
    teacher = Teacher(model).bind(student.config, bound_objective(student, model))
    assert teacher(make_batch()).logits.shape == (4, 3)
    assert model.seen == {"input_ids", "attention_mask", "token_type_ids"}


# ---- bit for bit the same after training ----


@pytest.mark.parametrize("changes", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2, "weight_decay": 0.1}])
def test_the_teacher_is_bit_identical_after_training_and_in_no_optimizer_or_checkpoint(make_trainer, tmp_path, changes):
    """Also its buffers, which a pass in train mode could move, as running statistics do."""
    teacher = make_teacher(dropout=0.3)
    teacher.classifier = nn.Sequential(nn.BatchNorm1d(32), teacher.classifier)
    teacher.train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    assert any("running_mean" in name for name in before)
    trainer = make_trainer(teacher=teacher, save_strategy="steps", save_steps=2, **changes)
    trainer.train()
    after = teacher.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert all(parameter.grad is None for parameter in teacher.parameters())
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized.isdisjoint(map(id, teacher.parameters()))
    shapes = {tuple(tensor.shape) for tensor in before.values() if tensor.dim() == 2 and tensor.shape[1] == 32}
    (checkpoint, *_) = Path(trainer.args.output_dir).glob("checkpoint-*")
    saved = {}
    for file in checkpoint.glob("*.safetensors"):
        saved |= load_file(file)
    assert saved
    assert not any("running_mean" in name for name in saved)
    teachers_embeddings = (100, 32)
    assert teachers_embeddings in shapes
    assert teachers_embeddings not in {tuple(tensor.shape) for tensor in saved.values()}


# ---- tokens of its own ----


OTHER_VOCAB = 60


def other_tokenizer():
    """The words of the student's tokenizer by other numbers, many of them in no entry; padding on the left."""
    tokenizer = make_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = {"[UNK]": 0, "[SEP]": 1, "[CLS]": 2, "[PAD]": 3} | {f"w{99 - i}": 4 + i for i in range(OTHER_VOCAB - 4)}
    backend["model"]["vocab"] = vocab
    backend["added_tokens"] = []
    for name, entry in backend["post_processor"]["special_tokens"].items():
        entry["ids"] = [vocab[name]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        padding_side="left",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def two_token_rows(rows=16, student_length=8, teacher_length=20):
    """The same texts as both tokenizers read them, cut at different lengths."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(4, 100, size=int(rng.integers(3, 18)))) for _ in range(rows)]
    data = Dataset.from_dict({"text": texts, "labels": rng.integers(0, 3, size=rows).tolist()})
    data = tokenize(data, other_tokenizer(), teacher_length, prefix="teacher_", keep_texts=True)
    return tokenize(data, make_tokenizer(), student_length), texts


def own_teacher(**settings):
    return Teacher(make_teacher(vocab_size=OTHER_VOCAB, pad_token_id=3), other_tokenizer(), **settings)


def test_a_teacher_with_a_tokenizer_of_its_own_reads_its_own_tokens(make_trainer):
    data, texts = two_token_rows(4)
    student, teacher = make_student(dropout=0.0), own_teacher()
    tokenizer = other_tokenizer()
    encoded = tokenizer(texts, truncation=True, max_length=20, padding=True, return_tensors="pt")
    own = make_tokenizer()(texts, truncation=True, max_length=8, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = teacher.model(**encoded).logits
        before = student.eval()(input_ids=own["input_ids"], attention_mask=own["attention_mask"]).logits
    trainer = make_trainer(
        student=student, teacher=teacher, losses={"kl": KLDivergenceLoss(2.0)}, data=data, max_steps=1
    )
    trainer.train()
    (entry,) = step_logs(trainer)
    assert entry["loss_kl"] == pytest.approx(reference_kl(before, expected, 2.0), rel=1e-4)


def test_losses_that_compare_tokens_are_refused_by_name_across_tokenizers(make_trainer):
    data, _ = two_token_rows()
    with pytest.raises(ValueError, match="losses hidden, attention compare token by token, but the teacher reads"):
        make_trainer(teacher=own_teacher(), data=data)


@pytest.mark.parametrize("representation", ["first", "mean"])
def test_relations_between_examples_serve_across_tokenizers(make_trainer, representation):
    """The teacher's vectors are pooled with its own mask, which is padded on the other side."""
    data, texts = two_token_rows(4)
    student, teacher = make_student(dropout=0.0), own_teacher()
    loss = RKDDistanceLoss(layers=[[2, 4]], representation=representation)
    states = []
    with torch.no_grad():
        encoded = other_tokenizer()(texts, truncation=True, max_length=20, padding=True, return_tensors="pt")
        assert not encoded["attention_mask"][:, 0].all()
        found = teacher.model(**encoded, output_hidden_states=True).hidden_states[4]
        for state, real in zip(found, encoded["attention_mask"].bool(), strict=True):
            states.append(state[real][0] if representation == "first" else state[real].mean(0))
        own = make_tokenizer()(texts, truncation=True, max_length=8, padding=True, return_tensors="pt")
        inputs = {name: own[name] for name in ("input_ids", "attention_mask")}
        hidden = student.eval()(**inputs, output_hidden_states=True).hidden_states[2]
        mask = own["attention_mask"][..., None]
        mine = hidden[:, 0] if representation == "first" else (hidden * mask).sum(1) / mask.sum(1)
    expected = loss._relations(mine, torch.stack(states)).item()
    trainer = make_trainer(
        student=student, teacher=teacher, losses={"rkd": loss, "pkd": PKDLoss(layers=[[2, 4]])}, data=data, max_steps=1
    )
    trainer.train()
    (entry,) = step_logs(trainer)
    assert entry["loss_rkd"] == pytest.approx(expected, rel=1e-4)
    assert entry["loss_pkd"] > 0


def test_evaluation_needs_no_tokens_of_the_teachers(make_trainer):
    data, _ = two_token_rows()
    trainer = make_trainer(
        teacher=own_teacher(), losses={"kl": KLDivergenceLoss()}, data=data, eval_dataset=make_dataset(6)
    )
    assert trainer.evaluate()["eval_loss"] > 0
    both = trainer.predict(data).predictions
    alone = trainer.predict(data.remove_columns([n for n in data.column_names if n.startswith("teacher_")])).predictions
    assert np.array_equal(both, alone)


def test_data_without_the_teachers_tokens_are_refused(make_trainer):
    with pytest.raises(ValueError, match=r"the teacher reads the column teacher_input_ids, .* prefix=\"teacher_\""):
        make_trainer(teacher=own_teacher(), losses={"kl": KLDivergenceLoss()})


def test_a_prefix_begins_with_that_of_teachers():
    with pytest.raises(ValueError, match="prefix must begin with \"teacher_\", got 'other_'"):
        Teacher(make_teacher(), prefix="other_")


def test_a_student_that_takes_anything_gets_none_of_the_teachers_columns(make_trainer):
    class Anything(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = make_student().config
            self.inner = make_student(dropout=0.0)
            self.seen = set()

        def forward(self, **inputs):
            self.seen |= set(inputs)
            return self.inner(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])

    student, (data, _) = Anything(), two_token_rows()
    trainer = make_trainer(student=student, teacher=own_teacher(), losses={"kl": KLDivergenceLoss()}, data=data)
    trainer.train()
    trainer.predict(data)
    assert student.seen == {"input_ids", "attention_mask", "token_type_ids"}


# ---- more labels than the student's ----


def test_a_teacher_of_more_labels_is_restricted_and_renormalized(make_trainer):
    """The KL is that to the softmax over the student's labels alone."""
    data = make_dataset(4)
    more = make_teacher(**label_config(["other", "positive", "negative", "mixed", "neutral"]))
    student = make_student(dropout=0.0)
    with pytest.raises(ValueError, match="restrict_labels"):
        make_trainer(teacher=more, losses={"kl": KLDivergenceLoss()}, data=data)
    batch = make_batch(data)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        before = student.eval()(**inputs).logits
        answers = more(**inputs, token_type_ids=batch["token_type_ids"]).logits[:, [2, 4, 1]]
    trainer = make_trainer(
        student=student,
        teacher=Teacher(more, restrict_labels=True),
        losses={"kl": KLDivergenceLoss(2.0)},
        data=data,
        max_steps=1,
    )
    trainer.train()
    (entry,) = step_logs(trainer)
    assert entry["loss_kl"] == pytest.approx(reference_kl(before, answers, 2.0), rel=1e-4)
