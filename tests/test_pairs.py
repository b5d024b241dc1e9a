"""Pairs of model families: the trainer depends on what a model gives, not on its name."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    bert_config,
    label_config,
    largest_difference,
    make_batch,
    make_dataset,
    make_student,
    make_teacher,
    parameters_of,
    seeded,
    step_logs,
)
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
)

from distill_nlp.losses import LOSSES

EXAMPLE = Path(__file__).parent.parent / "examples" / "bert_to_bilstm.py"
RESPONSES = ("ce", "kl", "reverse_kl", "js", "soft_ce", "logits_mse", "dkd", "dist")
# A longer text than ModernBERT's local window below.
LONG = 24


def tiny(config_class, layers: int, width: int, heads: int, **settings):
    config = config_class(
        vocab_size=100,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        max_position_embeddings=40,
        initializer_range=0.2,
        pad_token_id=0,
        **label_config(),
        **settings,
    )
    return AutoModelForSequenceClassification.from_config(config)


def modernbert(layers: int, width: int):
    """The first block and each third one see all tokens, the others 4 to each side."""
    tokens = {"bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    return tiny(ModernBertConfig, layers, width, 4, local_attention=8, **tokens)


def bilstm():
    spec = importlib.util.spec_from_file_location("bert_to_bilstm", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.BiLSTMClassifier(vocab_size=100, num_labels=3, width=16)


def roberta(layers: int):
    return tiny(RobertaConfig, layers, 32, 4, type_vocab_size=1)


def mpnet(layers: int, width: int, heads: int):
    return tiny(MPNetConfig, layers, width, heads)


# teacher, student
TRANSFORMERS = {
    "bert_distilbert": (make_teacher, make_student),
    "roberta_distilroberta": (lambda: roberta(4), lambda: roberta(2)),
    "electra_bert": (
        lambda: tiny(ElectraConfig, 4, 32, 4, embedding_size=16),
        lambda: make_teacher(seed=2, hidden_size=24, num_attention_heads=3, num_hidden_layers=2),
    ),
    "modernbert_modernbert": (lambda: modernbert(6, 32), lambda: modernbert(3, 24)),
    "mpnet_mpnet": (lambda: mpnet(4, 32, 4), lambda: mpnet(2, 24, 3)),
    "mpnet_bert": (
        lambda: mpnet(4, 32, 4),
        lambda: make_teacher(seed=2, hidden_size=24, num_attention_heads=3, num_hidden_layers=2),
    ),
}
PAIRS = TRANSFORMERS | {"bert_bilstm": (make_teacher, bilstm)}


def models(pair: str):
    teacher, student = (seeded(seed, build) for seed, build in enumerate(PAIRS[pair], start=1))
    if pair.startswith("modernbert") and not teacher._can_set_attn_implementation():
        pytest.skip("in this version of Transformers ModernBERT is not on the attention interface")
    return teacher, student


def data(pair: str, rows: int = 16, seed: int = 0):
    """RoBERTa has one segment only, as its tokenizers make none."""
    dataset = make_dataset(rows, seed=seed, unlabeled=(1, 6), max_length=LONG)
    return dataset.remove_columns("token_type_ids") if pair.startswith("roberta") else dataset


def train(make_trainer, pair: str, names, name="run", **settings):
    teacher, student = models(pair)
    teacher_before, student_before = parameters_of(teacher), parameters_of(student)
    defaults = {"max_steps": 2, "per_device_train_batch_size": 6, "optim": "sgd"}
    trainer = make_trainer(
        name,
        student=student,
        teacher=teacher,
        losses={loss: LOSSES[loss]() for loss in names},
        loss_weights={},
        data=data(pair),
        eval_dataset=data(pair, 8, seed=9),
        **(defaults | settings),
    )
    objective_before = parameters_of(trainer.objective)
    trainer.train()
    logs = step_logs(trainer)
    assert len(logs) == 2
    for entry in logs:
        for loss in names:
            assert np.isfinite(entry[f"loss_{loss}"])
            assert entry[f"loss_{loss}"] > 0, loss
    assert largest_difference(parameters_of(teacher), teacher_before) == 0
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    return trainer, student_before, objective_before


def unmoved(before, module) -> set[str]:
    after = parameters_of(module)
    return {name for name, tensor in before.items() if torch.equal(after[name], tensor)}


@pytest.mark.parametrize("pair", PAIRS)
def test_any_pair_learns_from_responses(make_trainer, pair):
    trainer, before, _ = train(make_trainer, pair, RESPONSES)
    # Segments, the padding and positions that no text has are as they were.
    still = {name for name in unmoved(before, trainer.student) if "embedding" not in name}
    assert still == set()


@pytest.mark.parametrize("pair", TRANSFORMERS)
def test_any_pair_of_transformers_learns_from_all_losses(make_trainer, pair):
    trainer, before, projections = train(make_trainer, pair, tuple(LOSSES))
    assert {name for name in unmoved(before, trainer.student) if "embedding" not in name} == set()
    assert unmoved(projections, trainer.objective) == set()
    kinds = {name.split(".")[1] for name in projections}
    assert kinds == (set() if pair.startswith("roberta") else {"hidden", "pkd", "fsp"})


LAYERED = ("hidden", "pkd", "nst", "fsp", "attention", "token_relation", "rkd_distance", "rkd_angle", "similarity")


@pytest.mark.parametrize("name", LAYERED)
@pytest.mark.parametrize("pair", TRANSFORMERS)
def test_each_loss_of_layers_reaches_the_student_by_itself(make_trainer, pair, name):
    trainer, before, _ = train(make_trainer, pair, (name,))
    assert largest_difference(parameters_of(trainer.student), before) > 1e-7


@pytest.mark.parametrize("pair", PAIRS)
def test_any_pair_is_evaluated_saved_and_resumed(make_trainer, tmp_path, pair):
    names = ("ce", "kl") if pair == "bert_bilstm" else ("ce", "kl", "hidden", "attention")
    settings = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear"}
    trainer, _, _ = train(make_trainer, pair, names, **settings)

    rows = data(pair, 8, seed=9)
    accepted = ["input_ids", "attention_mask"]
    if pair in ("electra_bert", "mpnet_bert"):
        accepted.append("token_type_ids")
    batch = make_batch(make_dataset(8, seed=9, unlabeled=(1, 6), max_length=LONG), range(8))
    trainer.model.eval()
    with torch.no_grad():
        outputs = trainer.student(**{name: batch[name] for name in accepted})
    logits = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
    labeled = [i for i in range(8) if i not in (1, 6)]
    expected = -logits.double().log_softmax(-1)[labeled, batch["labels"][labeled]].mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(trainer.predict(rows).predictions, logits.numpy(), atol=1e-5)

    trainer.save_model(str(tmp_path / "saved"))
    if pair == "bert_bilstm":
        saved = load_file(tmp_path / "saved" / "model.safetensors")
    else:
        model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert {name: keys for name, keys in info.items() if keys} == {}
        saved = parameters_of(model)
    assert largest_difference(saved, parameters_of(trainer.student)) == 0

    teacher, student = models(pair)
    resumed = make_trainer(
        "resumed",
        student=student,
        teacher=teacher,
        losses={loss: LOSSES[loss]() for loss in names},
        loss_weights={},
        data=data(pair),
        max_steps=2,
        per_device_train_batch_size=6,
        optim="sgd",
        **settings,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert largest_difference(parameters_of(resumed.model), parameters_of(trainer.model)) == 0


# ---- ModernBERT ----


def test_modernbert_is_compared_within_its_local_windows(make_trainer):
    """The logged loss is that of the maps that eager attention returns, in blocks that see 4 tokens to each side."""
    teacher, student = models("modernbert_modernbert")
    losses = {"attention": LOSSES["attention"](layers=[[2, 3]])}
    trainer = make_trainer(
        student=student, teacher=teacher, losses=losses, loss_weights={}, data=data("modernbert"), max_steps=1
    )
    batch = make_batch(data("modernbert"))
    maps = []
    for model, layer in zip(models("modernbert_modernbert"), (3, 2), strict=True):
        model.eval().set_attn_implementation("eager")
        with torch.no_grad():
            outputs = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_attentions=True)
        maps.append(outputs.attentions[layer - 1].double().numpy())
    rows = []
    for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        total, count = 0.0, 0
        for head in range(4):
            for query in range(length):
                for key in range(length):
                    t, s = (each[row, head, query, key] for each in maps)
                    assert (t > 0) == (s > 0) == (abs(query - key) <= 4)
                    total += t * np.log(t / s) if t > 0 else 0.0
                count += 1
        rows.append(total / count)
    assert batch["attention_mask"].sum(dim=1).max() > 8
    trainer.train()
    assert step_logs(trainer)[0]["loss_attention"] == pytest.approx(sum(rows) / len(rows), rel=1e-4)


# ---- what does not fit ----


@pytest.mark.parametrize("name", LAYERED)
def test_losses_of_layers_are_refused_for_a_model_without_layers_in_one_line(make_trainer, name):
    teacher, student = models("bert_bilstm")
    for without in (student, no_config(student)):
        with pytest.raises(ValueError, match=rf"losses\.{name}: {LOSSES[name].__name__} reads layers") as error:
            make_trainer(student=without, teacher=teacher, losses={name: LOSSES[name]()}, loss_weights={})
        assert "the student's config has no num_hidden_layers" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle", "similarity"])
def test_relations_of_examples_by_their_logits_fit_any_pair(make_trainer, name):
    teacher, student = models("bert_bilstm")
    before = parameters_of(student)
    losses = {name: LOSSES[name](representation="logits")}
    trainer = make_trainer(student=student, teacher=teacher, losses=losses, loss_weights={}, data=data("bert"))
    trainer.train()
    assert all(entry[f"loss_{name}"] > 0 for entry in step_logs(trainer))
    assert {name for name in unmoved(before, student) if "embedding" not in name} == set()


def no_config(student: nn.Module) -> nn.Module:
    del student.config
    return student


def test_a_student_without_config_answers_as_the_teacher_does(make_trainer, tmp_path):
    with_config, without = (seeded(2, bilstm) for _ in range(2))
    no_config(without)
    results = {}
    for name, student in (("with", with_config), ("without", without)):
        trainer = make_trainer(
            name,
            student=student,
            losses={loss: LOSSES[loss]() for loss in RESPONSES},
            loss_weights={},
            data=data("bert"),
            eval_dataset=data("bert", 8, seed=9),
            save_strategy="steps",
            save_steps=2,
        )
        trainer.train()
        results[name] = parameters_of(student), trainer.evaluate()["eval_loss"]
        assert (tmp_path / name / "checkpoint-2" / "model.safetensors").exists()
    assert largest_difference(results["with"][0], results["without"][0]) == 0
    assert results["with"][1] == results["without"][1] > 0


def test_widths_that_differ_are_refused_where_no_projection_is_wanted(make_trainer):
    losses = {"hidden": LOSSES["hidden"](projection="none")}
    with pytest.raises(ValueError, match=r'losses\.hidden: projection "none" needs equal widths; the student has 24'):
        make_trainer(losses=losses)


def test_head_counts_that_differ_are_refused_where_heads_are_compared_one_by_one(make_trainer):
    teacher, student = models("electra_bert")
    losses = {"attention": LOSSES["attention"](heads="each")}
    with pytest.raises(ValueError, match=r'losses\.attention: heads "each" needs equal head counts; the student has 3'):
        make_trainer(student=student, teacher=teacher, losses=losses)


def test_a_model_outside_the_attention_interface_is_refused_by_name(make_trainer):
    """A config with layers promises more than the model has."""
    student = seeded(2, bilstm)
    student.config = bert_config()
    with pytest.raises(ValueError, match=r"BiLSTMClassifier does not use Transformers' attention interface"):
        make_trainer(student=student, losses={"attention": LOSSES["attention"]()}, loss_weights={})


# ---- the BiLSTM itself ----


def test_the_bilstm_does_not_see_padding():
    student = seeded(2, bilstm).eval()
    batch = make_batch()
    wide = make_batch(width=30)
    wide["input_ids"][wide["attention_mask"] == 0] = 77
    with torch.no_grad():
        logits = student(batch["input_ids"], batch["attention_mask"])
        torch.testing.assert_close(student(wide["input_ids"], wide["attention_mask"]), logits, rtol=0, atol=1e-6)
        for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
            alone = student(batch["input_ids"][row : row + 1, :length], torch.ones(1, length, dtype=torch.long))
            torch.testing.assert_close(alone[0], logits[row], rtol=0, atol=1e-6)
