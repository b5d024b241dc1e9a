"""The golden tests of training: against a loop by hand, against itself cut otherwise, and against a resumed self."""

import copy
import json

import numpy as np
import pytest
import torch
from helpers import (
    ALL_WEIGHTS,
    LABELS,
    all_losses,
    checkpointing,
    largest_difference,
    make_arguments,
    make_batch,
    make_dataset,
    make_student,
    make_teacher,
    make_tokenizer,
    parameters_of,
    step_logs,
)
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments, pipeline

from distill_nlp import (
    AttentionLoss,
    CrossEntropyLoss,
    DistillationTrainer,
    HiddenStateLoss,
    KLDivergenceLoss,
)

TERMS = tuple(ALL_WEIGHTS)


# ---- training moves what it should ----


def test_train_moves_student_and_projections_and_leaves_the_teacher(make_trainer):
    teacher = make_teacher()
    trainer = make_trainer(teacher=teacher, weight_decay=0.1)
    teacher_before = parameters_of(teacher) | dict(teacher.named_buffers())
    student_before, objective_before = parameters_of(trainer.student), parameters_of(trainer.objective)
    assert len(objective_before) == 4
    trainer.train()
    teacher_after = parameters_of(teacher) | dict(teacher.named_buffers())
    assert all(torch.equal(teacher_after[name], tensor) for name, tensor in teacher_before.items())
    for before, after in (
        (student_before, parameters_of(trainer.student)),
        (objective_before, parameters_of(trainer.objective)),
    ):
        assert [name for name, tensor in before.items() if torch.equal(after[name], tensor)] == []


def test_the_teacher_is_no_part_of_the_model_nor_of_the_optimizer(make_trainer):
    teacher = make_teacher()
    trainer = make_trainer(teacher=teacher)
    optimizer = trainer.create_optimizer()
    theirs = {id(parameter) for parameter in teacher.parameters()}
    assert not theirs & {id(parameter) for parameter in trainer.model.parameters()}
    ours = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert not theirs & set(ours)
    assert sorted(ours) == sorted(id(parameter) for parameter in trainer.model.parameters())


def test_a_loss_of_weight_zero_is_as_if_it_were_not_there(make_trainer):
    with_zero = make_trainer("a", loss_weights=ALL_WEIGHTS | {"hidden": 0.0})
    losses = all_losses()
    del losses["hidden"]
    without = make_trainer("b", losses=losses)
    for trainer in (with_zero, without):
        trainer.train()
    assert "loss_hidden" not in step_logs(with_zero)[0]
    assert largest_difference(parameters_of(with_zero.model), parameters_of(without.model)) == 0


# ---- against a loop by hand ----


def terms_by_hand(student, teacher, projections, batch, temperature=2.0):
    """Row by row, from eager models' own outputs; student 2 blocks and teacher 4, so 1→2 and 2→4."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    outputs = {"output_hidden_states": True, "output_attentions": True}
    s = student(**inputs, **outputs)
    with torch.no_grad():
        t = teacher(**inputs, token_type_ids=batch["token_type_ids"], **outputs)
    rows = {name: [] for name in TERMS}
    for b, label in enumerate(batch["labels"].tolist()):
        n = int(batch["attention_mask"][b].sum())
        if label != -100:
            rows["ce"].append(-s.logits[b].log_softmax(0)[label])
        p_s, p_t = (x[b] / temperature for x in (s.logits, t.logits))
        p_s, p_t = p_s.exp() / p_s.exp().sum(), p_t.exp() / p_t.exp().sum()
        rows["kl"].append(temperature**2 * (p_t * (p_t / p_s).log()).sum())
        hidden, attention = 0.0, 0.0
        for (weight, bias), (i, j) in zip(projections, ((1, 2), (2, 4)), strict=True):
            x = s.hidden_states[i][b, :n] @ weight.T + bias
            hidden = hidden + (x - t.hidden_states[j][b, :n]).pow(2).mean() / 2
            a = s.attentions[i - 1][b, :, :n, :n].mean(0)
            c = t.attentions[j - 1][b, :, :n, :n].mean(0)
            attention = attention + (c * (c / a).log()).sum(-1).mean() / 2
        rows["hidden"].append(hidden)
        rows["attention"].append(attention)
    return {name: sum(values) / max(len(values), 1) for name, values in rows.items()}


def eager(model):
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    return model


def test_train_equals_a_loop_by_hand(make_trainer):
    """Terms, total and parameters of four SGD steps over ragged rows, some of them without a label."""
    student, teacher = make_student(dropout=0.0), make_teacher()
    dataset = make_dataset(16, unlabeled=(1, 6, 8, 9, 10, 11))
    own_student, own_teacher = eager(student).train(), eager(teacher)
    trainer = make_trainer(
        student=student, teacher=teacher, data=dataset, optim="sgd", learning_rate=0.05, max_grad_norm=0.0
    )
    projections = [
        (copy.deepcopy(p.weight), copy.deepcopy(p.bias)) for p in trainer.objective.losses["hidden"].projections
    ]
    parameters = [*own_student.parameters(), *(tensor for pair in projections for tensor in pair)]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    expected = []
    for start in range(0, 16, 4):
        terms = terms_by_hand(own_student, own_teacher, projections, make_batch(dataset, range(start, start + 4)))
        total = sum(ALL_WEIGHTS[name] * value for name, value in terms.items())
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(
            {"loss": total.item()}
            | {f"loss_{name}": value.item() if torch.is_tensor(value) else value for name, value in terms.items()}
        )

    trainer.train()
    logs = step_logs(trainer)
    assert len(logs) == 4
    for entry, numbers in zip(logs, expected, strict=True):
        assert {name: entry[name] for name in numbers} == pytest.approx(numbers, rel=1e-4)
    assert expected[2]["loss_ce"] == 0
    assert largest_difference(parameters_of(trainer.student), parameters_of(own_student)) < 1e-5
    for ours, theirs in zip(trainer.objective.losses["hidden"].projections, projections, strict=True):
        torch.testing.assert_close(ours.weight, theirs[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.bias, theirs[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_terms_are_logged_unweighted_as_means_over_the_window(make_trainer, accumulation):
    """With a learning rate of 0 each step's terms are those of its rows; two steps are one window."""
    student, teacher = make_student(dropout=0.0), make_teacher()
    dataset = make_dataset(16, unlabeled=(1, 6, 9))
    trainer = make_trainer(
        student=student,
        teacher=teacher,
        data=dataset,
        learning_rate=0.0,
        logging_steps=2,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        eval_dataset=make_dataset(4, seed=9),
        eval_strategy="steps",
        eval_steps=1,
    )
    projections = [(p.weight, p.bias) for p in trainer.objective.losses["hidden"].projections]
    own_student, own_teacher = eager(student), eager(teacher)
    with torch.no_grad():
        steps = [
            terms_by_hand(own_student, own_teacher, projections, make_batch(dataset, range(start, start + 4)))
            for start in range(0, 16, 4)
        ]
    trainer.train()
    logs = step_logs(trainer)
    assert [entry["step"] for entry in logs] == [2, 4]
    for entry, window in zip(logs, (steps[:2], steps[2:]), strict=True):
        means = {name: sum(float(step[name]) for step in window) / 2 for name in TERMS}
        assert {name: entry[f"loss_{name}"] for name in TERMS} == pytest.approx(means, rel=1e-4)
        assert entry["loss"] == pytest.approx(sum(ALL_WEIGHTS[name] * means[name] for name in TERMS), rel=1e-4)


def test_the_total_is_the_weighted_sum_of_the_terms(make_trainer):
    trainer = make_trainer(student=make_student(), logging_steps=3, max_steps=7)
    trainer.train()
    logs = step_logs(trainer)
    assert [entry["step"] for entry in logs] == [3, 6]
    for entry in logs:
        expected = sum(weight * entry[f"loss_{name}"] for name, weight in ALL_WEIGHTS.items())
        assert entry["loss"] == pytest.approx(expected, rel=1e-5)


# ---- accumulation ----


@pytest.mark.parametrize(
    "settings",
    [{"optim": "sgd", "learning_rate": 0.02}, {"optim": "adamw_torch", "learning_rate": 1e-3, "adam_epsilon": 1e-2}],
    ids=["sgd", "adamw"],
)
def test_accumulation_does_not_change_the_result(make_trainer, settings):
    """8×1 = 4×2 = 2×4 = 1×8, with a last step of 6 rows and with rows without a label, unevenly spread."""
    dataset = make_dataset(14, unlabeled=(0, 1, 2, 3, 9, 13))
    results, logs = {}, {}
    for size, accumulation in ((8, 1), (4, 2), (2, 4), (1, 8)):
        trainer = make_trainer(
            f"{size}x{accumulation}",
            data=dataset,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=-1,
            num_train_epochs=2,
            # Clipping would hide a gradient of another size.
            max_grad_norm=0.0,
            **settings,
        )
        trainer.train()
        assert trainer.state.global_step == 4
        results[size], logs[size] = parameters_of(trainer.model), step_logs(trainer)
    for size in (4, 2, 1):
        assert largest_difference(results[size], results[8]) < 1e-6
        for entry, whole in zip(logs[size], logs[8], strict=True):
            for name in ("loss", *(f"loss_{term}" for term in TERMS)):
                assert entry[name] == pytest.approx(whole[name], rel=1e-5)


def test_accumulation_with_gradient_checkpointing_is_the_same(make_trainer):
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "optim": "sgd",
        "max_grad_norm": 0.0,
    }
    plain = make_trainer("plain", **settings)
    checkpointed = make_trainer("checkpointed", **checkpointing(), **settings)
    for trainer in (plain, checkpointed):
        trainer.train()
    assert checkpointed.student.is_gradient_checkpointing
    assert not plain.student.is_gradient_checkpointing
    assert largest_difference(parameters_of(checkpointed.model), parameters_of(plain.model)) < 1e-6


def test_reentrant_checkpointing_with_attention_losses_is_refused(make_trainer):
    trainer = make_trainer(**checkpointing(use_reentrant=True))
    with pytest.raises(ValueError, match="attention losses need"):
        trainer.train()


# ---- evaluation ----


def test_evaluation_is_the_plain_task_loss_and_the_teacher_does_not_run(make_trainer):
    student, teacher = make_student(), make_teacher()
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    dataset = make_dataset(12, seed=4)
    trainer = make_trainer(
        student=student,
        teacher=teacher,
        eval_dataset=dataset,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        per_device_eval_batch_size=6,
    )
    metrics = trainer.evaluate()
    prediction = trainer.predict(dataset)
    assert calls == []
    batch = make_batch(dataset, range(12))
    with torch.no_grad():
        logits = student.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = -logits.double().log_softmax(-1)[range(12), batch["labels"]].mean().item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx((logits.argmax(-1) == batch["labels"]).double().mean().item())
    assert prediction.predictions.shape == (12, 3)
    np.testing.assert_allclose(prediction.predictions, logits.numpy(), atol=1e-5)
    np.testing.assert_array_equal(prediction.label_ids, batch["labels"].numpy())
    trainer.train()
    assert len(calls) == 4


def test_prediction_needs_no_labels(make_trainer):
    dataset = make_dataset(5).remove_columns("labels")
    assert make_trainer().predict(dataset).predictions.shape == (5, 3)


# ---- saving ----


def test_saved_model_is_a_plain_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    assert not files & {"training_args.bin", "objective.safetensors"}
    assert "distill_nlp" not in (tmp_path / "saved" / "config.json").read_text()

    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert {name: keys for name, keys in info.items() if keys} == {}
    assert model.config.id2label == dict(enumerate(LABELS))
    assert largest_difference(parameters_of(model), parameters_of(trainer.student)) == 0

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    inputs = tokenizer("w4 w5 w6", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[2, 4, 5, 6, 3]]
    with torch.no_grad():
        model.eval()
        probabilities = model(input_ids=inputs["input_ids"]).logits.softmax(-1)[0]
    (answer,) = pipeline("text-classification", model=str(tmp_path / "saved"), device="cpu")("w4 w5 w6")
    assert answer["label"] == LABELS[int(probabilities.argmax())]
    assert answer["score"] == pytest.approx(probabilities.max().item(), rel=1e-5)


def test_a_student_that_is_no_transformers_model_is_saved_and_resumed(make_trainer, tmp_path):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = make_student().config
            self.embedding = nn.EmbeddingBag(100, 3)

        def forward(self, input_ids):
            return {"logits": self.embedding(input_ids)}

    losses = {"ce": CrossEntropyLoss(), "kl": KLDivergenceLoss()}
    torch.manual_seed(0)
    trainer = make_trainer(student=Bag(), losses=losses, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert largest_difference(saved, parameters_of(trainer.student)) == 0
    resumed = make_trainer("resumed", student=Bag(), losses=losses)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert largest_difference(parameters_of(resumed.model), parameters_of(trainer.model)) == 0


def run_with_checkpoints(make_trainer, name, resume_from=None, **settings):
    """Eight steps in two shuffled epochs, with dropout; checkpoints 3 and 6 lie inside an epoch."""
    trainer = make_trainer(
        name,
        student=make_student(dropout=0.1),
        data=make_dataset(16, unlabeled=(1, 6)),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=-1,
        num_train_epochs=2,
        train_sampling_strategy="random",
        lr_scheduler_type="linear",
        projection_learning_rate_factor=5.0,
        save_strategy="steps",
        save_steps=3,
        **settings,
    )
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer


def test_resuming_reproduces_the_uninterrupted_run_exactly(make_trainer, tmp_path):
    whole = run_with_checkpoints(make_trainer, "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert "training_args.bin" not in {path.name for path in checkpoint.iterdir()}
    assert set(load_file(checkpoint / "objective.safetensors")) == set(whole.objective.state_dict())
    assert not any(name.startswith(("student.", "objective.")) for name in load_file(checkpoint / "model.safetensors"))

    resumed = run_with_checkpoints(make_trainer, "resumed", resume_from=str(checkpoint))
    assert resumed.state.global_step == whole.state.global_step == 8
    assert largest_difference(parameters_of(resumed.student), parameters_of(whole.student)) == 0
    assert largest_difference(parameters_of(resumed.objective), parameters_of(whole.objective)) == 0
    names = ("loss", "learning_rate", "grad_norm", *(f"loss_{term}" for term in TERMS))
    later = [{name: entry[name] for name in names} for entry in step_logs(whole)[3:]]
    assert len(later) == 5
    assert [{name: entry[name] for name in names} for entry in step_logs(resumed)[3:]] == later


def test_the_best_model_is_loaded_at_the_end(make_trainer, tmp_path):
    """The metric falls, so that the first epoch is the best."""
    scores = iter([0.9, 0.5, 0.1])
    trainer = make_trainer(
        eval_dataset=make_dataset(4, seed=9),
        compute_metrics=lambda _: {"score": next(scores)},
        max_steps=-1,
        num_train_epochs=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer.train()
    best, last = tmp_path / "run" / "checkpoint-4", tmp_path / "run" / "checkpoint-12"
    assert trainer.state.best_model_checkpoint == str(best)
    student, objective = parameters_of(trainer.student), parameters_of(trainer.objective)
    assert largest_difference(student, load_file(best / "model.safetensors")) == 0
    assert largest_difference(objective, load_file(best / "objective.safetensors")) == 0
    assert largest_difference(student, load_file(last / "model.safetensors")) > 1e-3
    assert largest_difference(objective, load_file(last / "objective.safetensors")) > 1e-3


@pytest.mark.parametrize(
    ("saved", "wanted", "message"),
    [
        ({"kl": KLDivergenceLoss}, {"hidden": HiddenStateLoss}, "no objective.safetensors there"),
        ({"hidden": HiddenStateLoss}, {"other": HiddenStateLoss}, r"losses\.other\.projections"),
        ({"hidden": HiddenStateLoss}, {"hidden": lambda: HiddenStateLoss("last")}, r"losses\.hidden\.projections\.1"),
        ({"hidden": HiddenStateLoss}, {"kl": KLDivergenceLoss}, r"losses\.hidden\.projections"),
    ],
)
def test_a_checkpoint_of_other_losses_is_refused(make_trainer, tmp_path, saved, wanted, message):
    first = make_trainer("first", losses={name: loss() for name, loss in saved.items()}, save_strategy="steps")
    first.args.save_steps = first.args.max_steps = 2
    first.train()
    folder = str(tmp_path / "first" / "checkpoint-2")
    second = make_trainer("second", losses={name: loss() for name, loss in wanted.items()})
    with pytest.raises(ValueError, match=message) as error:
        second.train(resume_from_checkpoint=folder)
    assert str(error.value).startswith(f"cannot load the checkpoint {folder}: ")


def test_a_checkpoint_of_another_student_or_none_is_refused(make_trainer, tmp_path):
    first = make_trainer("first", max_steps=1, save_strategy="steps", save_steps=1)
    first.train()
    folder = tmp_path / "first" / "checkpoint-1"
    for changes in ({"n_layers": 1}, {"n_layers": 3}, {"hidden_dim": 40}):
        losses = {"kl": KLDivergenceLoss(), "hidden": HiddenStateLoss([[1, 2]])}
        second = make_trainer("second", student=make_student(**changes), losses=losses)
        with pytest.raises(ValueError, match="cannot load the checkpoint"):
            second.train(resume_from_checkpoint=str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"the checkpoint .* is not whole: model.safetensors is missing"):
        make_trainer("third").train(resume_from_checkpoint=str(folder))


# ---- optimizer ----


def test_projections_learn_at_their_own_rate_and_follow_the_schedule(make_trainer):
    trainer = make_trainer(learning_rate=1e-12, projection_learning_rate_factor=1e11, lr_scheduler_type="linear")
    student, objective = parameters_of(trainer.student), parameters_of(trainer.objective)
    trainer.train()
    assert largest_difference(parameters_of(trainer.student), student) < 1e-10
    assert largest_difference(parameters_of(trainer.objective), objective) > 0.1
    assert trainer.optimizer.param_groups[-1]["initial_lr"] == pytest.approx(0.1)
    assert trainer.optimizer.param_groups[-1]["lr"] == 0.0


def test_own_groups_of_projections_hold_each_parameter_once_and_keep_the_decay(make_trainer):
    trainer = make_trainer(learning_rate=0.01, projection_learning_rate_factor=10.0, weight_decay=0.2)
    optimizer = trainer.create_optimizer()
    rates, decays = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in rates
            rates[id(parameter)], decays[id(parameter)] = group["lr"], group["weight_decay"]
    named = dict(trainer.model.named_parameters())
    assert rates.keys() == {id(parameter) for parameter in named.values()}
    for name, parameter in named.items():
        assert rates[id(parameter)] == (0.1 if name.startswith("objective.") else 0.01), name
        plain = name.endswith("bias") or "norm" in name.lower()
        assert decays[id(parameter)] == (0.0 if plain else 0.2), name


def test_plain_training_arguments_are_enough(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, disable_tqdm=True, report_to="none")
    trainer = DistillationTrainer(
        model=make_student(),
        teacher=make_teacher(),
        losses=all_losses(),
        args=args,
        train_dataset=make_dataset(),
        processing_class=make_tokenizer(),
    )
    assert trainer.train().global_step == 1


# ---- precision ----


def test_bfloat16_autocast_is_finite_and_covers_the_teacher(make_trainer, tmp_path):
    teacher = make_teacher()
    dtypes = set()
    teacher.register_forward_hook(lambda module, args, output: dtypes.add(output.logits.dtype))
    trainer = make_trainer(teacher=teacher, bf16=True, **checkpointing())
    trainer.train()
    assert dtypes == {torch.bfloat16}
    for entry in step_logs(trainer):
        assert all(np.isfinite(value) for name, value in entry.items() if name.startswith("loss"))
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in trainer.model.parameters())
    exact = make_trainer("exact")
    exact.train()
    for name in ("loss", *(f"loss_{term}" for term in TERMS)):
        assert step_logs(trainer)[0][name] == pytest.approx(step_logs(exact)[0][name], rel=0.05)


# ---- kinds of data and tasks ----


def test_unlabeled_text_trains_losses_that_need_no_labels(make_trainer):
    losses = {"kl": KLDivergenceLoss(), "attention": AttentionLoss(kind="mse")}
    data = make_dataset(16, unlabeled=tuple(range(16)))
    labeled_minus_100 = make_trainer("a", losses=losses, data=data)
    losses = {"kl": KLDivergenceLoss(), "attention": AttentionLoss(kind="mse")}
    no_column = make_trainer("b", losses=losses, data=data.remove_columns("labels"))
    for trainer in (labeled_minus_100, no_column):
        trainer.train()
    assert largest_difference(parameters_of(no_column.model), parameters_of(labeled_minus_100.model)) == 0
    with pytest.raises(ValueError, match="CrossEntropyLoss needs labels"):
        make_trainer("c", losses={"ce": CrossEntropyLoss()}, data=data.remove_columns("labels")).train()


def test_a_column_named_label_is_the_same(make_trainer):
    one, other = make_trainer("a"), make_trainer("b", data=make_dataset().rename_column("labels", "label"))
    for trainer in (one, other):
        trainer.train()
    assert largest_difference(parameters_of(one.model), parameters_of(other.model)) == 0


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("task", ["multi_label_classification", "regression"])
def test_train_multi_label_and_regression(make_trainer, task, accumulation):
    student = make_student(dropout=0.0, problem_type=task)
    teacher = make_teacher(problem_type=task)
    targets = [[float((i + c) % 2) for c in range(3)] for i in range(8)]
    targets[2] = [-100.0] * 3
    dataset = make_dataset(8).remove_columns("labels").add_column("labels", targets)
    losses = {"ce": CrossEntropyLoss(), "hidden": HiddenStateLoss()}
    if task != "regression":
        losses["kl"] = KLDivergenceLoss()
    trainer = make_trainer(
        student=student,
        teacher=teacher,
        losses=losses,
        data=dataset,
        eval_dataset=dataset.select([0, 1]),
        max_steps=1,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    batch = make_batch(make_dataset(8))
    with torch.no_grad():
        logits = student.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    rows = []
    for row in (0, 1, 3):
        y = torch.tensor(targets[row]).double()
        if task == "regression":
            rows.append((logits[row] - y).pow(2).mean())
        else:
            p = 1 / (1 + (-logits[row]).exp())
            rows.append(-(y * p.log() + (1 - y) * (1 - p).log()).mean())
    evaluated = trainer.evaluate()["eval_loss"]
    assert evaluated == pytest.approx(float(rows[0] + rows[1]) / 2, rel=1e-4)
    trainer.train()
    assert step_logs(trainer)[0]["loss_ce"] == pytest.approx(float(sum(rows)) / 3, rel=1e-4)


# ---- refusals ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_init": make_student}, "does not take model_init: pass model= and losses= instead"),
        ({"compute_loss_func": print}, "does not take compute_loss_func"),
        ({"teacher": None}, "losses kl, hidden need a teacher; pass teacher="),
        ({"losses": None}, "losses is empty"),
        ({"loss_weights": {"attention": 1.0}}, "loss_weights names 'attention'"),
        ({"teacher": make_teacher(**{"id2label": {0: "a", 1: "b"}})}, "the teacher has 2 labels"),
    ],
)
def test_refuses_what_does_not_fit(tmp_path, settings, message):
    defaults = {
        "model": make_student(),
        "teacher": make_teacher(),
        "losses": {"ce": CrossEntropyLoss(), "kl": KLDivergenceLoss(), "hidden": HiddenStateLoss()},
        "args": make_arguments(tmp_path),
    }
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(**(defaults | settings))


def test_a_student_that_shares_parameters_with_its_teacher_is_refused(tmp_path):
    """They would be frozen with the teacher's, and only the projections would learn, in silence."""
    student, teacher = make_student(dim=32, n_heads=4), make_teacher()
    student.distilbert.embeddings.word_embeddings = teacher.bert.embeddings.word_embeddings
    for pair in ((student, teacher), (teacher, teacher)):
        with pytest.raises(ValueError, match="the student and the teacher share parameters"):
            DistillationTrainer(*pair, all_losses(), args=make_arguments(tmp_path))


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = make_arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"2 GPUs in one process would be DataParallel.* `accelerate launch`"):
        DistillationTrainer(make_student(), make_teacher(), all_losses(), args=args)


def test_label_smoothing_of_the_trainer_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"use losses=\{'ce': CrossEntropyLoss\(label_smoothing=\.\.\.\)\}"):
        make_trainer(label_smoothing_factor=0.1)


def test_without_a_teacher_it_trains_on_labels(make_trainer, tmp_path):
    trainer = DistillationTrainer(
        model=make_student(dropout=0.0),
        losses={"ce": CrossEntropyLoss()},
        args=make_arguments(tmp_path, save_strategy="steps", save_steps=4),
        train_dataset=make_dataset(),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    assert trainer.teacher is None
    assert not (tmp_path / "checkpoint-4" / "objective.safetensors").exists()
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert all(entry["loss"] == pytest.approx(entry["loss_ce"], rel=1e-6) for entry in state["log_history"])


def test_the_seed_of_the_arguments_draws_the_projections(tmp_path):
    def projections(seed: int, noise: int):
        torch.manual_seed(noise)
        trainer = DistillationTrainer(
            model=make_student(),
            teacher=make_teacher(),
            losses={"hidden": HiddenStateLoss()},
            args=make_arguments(tmp_path, seed=seed),
        )
        return parameters_of(trainer.objective)

    assert largest_difference(projections(1, noise=5), projections(1, noise=6)) == 0
    assert largest_difference(projections(1, noise=5), projections(2, noise=5)) > 0


def test_noise_in_the_embeddings_is_the_students_and_only_in_training(make_trainer):
    """`neftune_noise_alpha` asks the model for its embeddings."""
    plain, noisy = (make_trainer(max_steps=1, neftune_noise_alpha=alpha) for alpha in (None, 5.0))
    plain.train()
    noisy.train()
    assert largest_difference(parameters_of(plain.student), parameters_of(noisy.student)) > 0
    assert not noisy.student.get_input_embeddings()._forward_hooks
