"""Terms of the objective in training: schedules, gradient norms, balancing, warnings; the start of projections."""

import logging

import pytest
import torch
from datasets import IterableDataset
from helpers import (
    ALL_WEIGHTS,
    all_losses,
    checkpointing,
    largest_difference,
    make_batch,
    make_dataset,
    make_student,
    make_teacher,
    make_tokenizer,
    parameters_of,
    step_logs,
)
from transformers import TrainingArguments

from distill_nlp import CrossEntropyLoss, DistillationTrainer, HiddenStateLoss, KLDivergenceLoss, PKDLoss
from distill_nlp.gradient_meter import gradient_norms

# ---- schedules ----


def test_weights_and_temperatures_follow_the_steps_of_training(make_trainer):
    losses = {"ce": CrossEntropyLoss(), "kl": KLDivergenceLoss({"schedule": "linear", "start": 5.0, "end": 1.0})}
    seen = []
    losses["kl"].register_forward_hook(lambda loss, args, output: seen.append(str(loss.temperature._now)))
    weights = {"ce": {"schedule": "linear", "start": 0.0, "end": 1.0}, "kl": 1.0}
    trainer = make_trainer(losses=losses, loss_weights=weights, max_steps=4)
    trainer.train()
    assert [entry["weight_ce"] for entry in step_logs(trainer)] == pytest.approx([0.0, 0.25, 0.5, 0.75])
    assert not any("weight_kl" in entry for entry in step_logs(trainer))
    assert seen == ["5.0", "4.0", "3.0", "2.0"]


def test_a_loss_for_the_first_part_only_is_not_computed_nor_logged_afterwards(make_trainer):
    weights = ALL_WEIGHTS | {"hidden": {"schedule": "range", "value": 1.0, "until": 0.5}}
    trainer = make_trainer(loss_weights=weights, max_steps=4)
    trainer.train()
    assert ["loss_hidden" in entry for entry in step_logs(trainer)] == [True, True, False, False]
    assert [entry["weight_hidden"] for entry in step_logs(trainer)] == [1.0, 1.0, 0.0, 0.0]


def test_the_teacher_does_not_run_while_no_loss_needs_it(make_trainer):
    """Half of the training on labels alone, then the teacher comes in; the hidden states never leave their weight 0."""
    teacher, asked = make_teacher(), []
    teacher.register_forward_hook(lambda *arguments: asked.append(trainer.state.global_step))
    losses = {"ce": CrossEntropyLoss(), "kl": KLDivergenceLoss(), "hidden": HiddenStateLoss()}
    weights = {"ce": 1.0, "kl": {"schedule": "range", "value": 1.0, "begin": 0.5}, "hidden": 0.0}
    trainer = make_trainer("run", teacher=teacher, losses=losses, loss_weights=weights, max_steps=8)
    trainer.train()
    steps = step_logs(trainer)
    with_kl = [i for i, entry in enumerate(steps) if "loss_kl" in entry]
    assert 3 <= len(with_kl) <= 5
    assert with_kl[-1] == 7
    assert sorted(set(asked)) == with_kl


def test_the_total_follows_the_schedule(make_trainer):
    weights = ALL_WEIGHTS | {"hidden": {"schedule": "exponential", "start": 4.0, "end": 0.25}}
    trainer = make_trainer(loss_weights=weights, max_steps=4)
    trainer.train()
    for entry, weight in zip(step_logs(trainer), (4.0, 2.0, 1.0, 0.5), strict=True):
        expected = sum(w * entry[f"loss_{n}"] for n, w in (ALL_WEIGHTS | {"hidden": weight}).items())
        assert entry["loss"] == pytest.approx(expected, rel=1e-5)


# ---- gradient norms and balancing ----


def norms_by_hand(rows):
    """Gradient norms of the terms on the untrained student, for these rows as the whole batch."""
    student, teacher = make_student(dropout=0.0), make_teacher()
    from distill_nlp import DistillationModel, DistillationObjective
    from distill_nlp.teacher import Teacher

    losses = {name: loss for name, loss in all_losses().items() if name != "hidden"}
    model = DistillationModel(student, DistillationObjective(losses), teacher.config).train()
    batch = make_batch(rows=rows)
    output = model(teacher=Teacher(teacher).bind(student.config, model.objective)(batch), keep_graph=True, **batch)
    return {name: norm.item() for name, norm in gradient_norms(output.terms, list(student.parameters())).items()}


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, checkpointing()])
def test_gradient_norms_are_those_of_the_first_micro_batch_as_if_it_were_the_whole(make_trainer, settings):
    trainer = make_trainer(max_steps=1, term_gradient_norm_steps=1, **settings)
    trainer.train()
    (entry,) = step_logs(trainer)
    for name, expected in norms_by_hand(range(4)).items():
        assert entry[f"gradient_norm_{name}"] == pytest.approx(expected, rel=1e-4), name
    assert entry["gradient_norm_hidden"] > 0


def test_gradient_norms_are_measured_every_so_many_steps(make_trainer):
    trainer = make_trainer(max_steps=5, term_gradient_norm_steps=2)
    trainer.train()
    assert ["gradient_norm_kl" in entry for entry in step_logs(trainer)] == [True, False, True, False, True]


@pytest.mark.parametrize("settings", [{}, checkpointing()])
def test_measuring_does_not_change_training(make_trainer, settings):
    def train(**more):
        trainer = make_trainer(student=make_student(dropout=0.1), max_steps=3, **settings, **more)
        torch.manual_seed(0)
        trainer.train()
        return parameters_of(trainer.model)

    assert largest_difference(train(), train(term_gradient_norm_steps=1)) == 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_balanced_gradients_are_in_the_ratio_of_the_weights(make_trainer, accumulation):
    """From the step after the measurement on, for all of its micro-batches."""
    trainer = make_trainer(max_steps=2, loss_balancing="gradient_norm", gradient_accumulation_steps=accumulation)
    trainer.train()
    first, second = step_logs(trainer)
    assert {name: first[f"weight_{name}"] for name in ALL_WEIGHTS} == pytest.approx(ALL_WEIGHTS)
    pulls = {n: second[f"weight_{n}"] * first[f"gradient_norm_{n}"] for n in ALL_WEIGHTS}
    for name, weight in ALL_WEIGHTS.items():
        assert pulls[name] / pulls["ce"] == pytest.approx(weight / ALL_WEIGHTS["ce"], rel=1e-4)
    for entry in (first, second):
        total = sum(entry[f"weight_{name}"] * entry[f"loss_{name}"] for name in ALL_WEIGHTS)
        assert entry["loss"] == pytest.approx(total, rel=1e-5)


def test_balancing_changes_the_steps_after_the_measurement(make_trainer):
    def train(steps, **settings):
        trainer = make_trainer(max_steps=steps, **settings)
        trainer.train()
        return parameters_of(trainer.model.student)

    balanced = {"loss_balancing": "gradient_norm", "term_gradient_norm_steps": 1}
    assert largest_difference(train(1), train(1, **balanced)) == 0
    assert largest_difference(train(2), train(2, **balanced)) > 1e-4


def test_the_balance_goes_into_checkpoints_and_not_into_the_saved_student(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=2, loss_balancing="gradient_norm", save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "objective.safetensors").exists()
    other = make_trainer("other", loss_balancing="gradient_norm")
    other._load_from_checkpoint(str(tmp_path / "run" / "checkpoint-2"))
    assert other.objective.balance.log_norms.tolist() == trainer.objective.balance.log_norms.tolist()
    assert trainer.objective.balance.log_norms.std() > 0


# ---- warnings ----


def test_a_term_that_is_exactly_zero_is_named(make_trainer, caplog):
    student = make_teacher(dropout=0.0)
    with caplog.at_level(logging.WARNING, logger="distill_nlp"):
        trainer = make_trainer(student=student, teacher=make_teacher(dropout=0.0), learning_rate=0.0, max_steps=3)
        trainer.train()
    names = [record.message.split("'")[1] for record in caplog.records if "exactly zero" in record.message]
    assert "hidden" in names
    assert "ce" not in names
    assert len(set(names)) == len(names)


# ---- projections ----


def hidden(init="least_squares", **settings):
    return {"hidden": HiddenStateLoss(projection_init=init, **settings), "ce": CrossEntropyLoss()}


@pytest.mark.parametrize("projection", ["linear", "shared", "low_rank", "orthogonal"])
def test_least_squares_start_lowers_the_first_loss(make_trainer, projection):
    def first(init):
        losses = hidden(init, projection=projection, rank=12)
        trainer = make_trainer(losses=losses, loss_weights={}, max_steps=1)
        trainer.train()
        return step_logs(trainer)[0]["loss_hidden"]

    assert first("least_squares") < 0.7 * first("random")


def test_least_squares_start_is_the_best_affine_map_of_the_rows_it_saw(make_trainer):
    """All 16 rows: no other projection has a lower loss, weighted by tokens."""
    losses = {"hidden": HiddenStateLoss(layers="last", projection_init="least_squares")}
    trainer = make_trainer(losses=losses, loss_weights={}, max_steps=1, learning_rate=1e-12)
    student, teacher = make_student(dropout=0.0).eval(), make_teacher()
    data = make_dataset()
    xs, ys = [], []
    for row in range(16):
        batch = make_batch(data, rows=[row])
        with torch.no_grad():
            ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            xs.append(student(**ids, output_hidden_states=True).hidden_states[2][0])
            segments = {"token_type_ids": batch["token_type_ids"]}
            ys.append(teacher(**ids, **segments, output_hidden_states=True).hidden_states[4][0])
    x, y = torch.cat(xs).double(), torch.cat(ys).double()
    x = torch.nn.functional.pad(x, (0, 1), value=1.0)
    # States after a layer norm add up to a constant: many maps are the best, and only their answers are compared.
    # Not torch.linalg.lstsq: its usual driver on the CPU (gelsy) finds one rank too few in about one call of four here.
    expected = x @ torch.linalg.pinv(x, rtol=1e-5) @ y
    trainer.train()
    (projection,) = trainer.objective.losses["hidden"].projections
    torch.testing.assert_close(projection.double()(x[:, :-1]), expected, rtol=0, atol=1e-3)


def test_least_squares_start_leaves_order_and_dropout_of_training_alone(make_trainer):
    """The student does not learn from the projections here: it must come out the same with any start."""

    def train(init):
        losses = {"ce": CrossEntropyLoss(), "pkd": PKDLoss(projection_init=init)}
        trainer = make_trainer(
            student=make_student(dropout=0.1),
            losses=losses,
            loss_weights={"pkd": 1e-20},
            train_sampling_strategy="random",
            max_steps=3,
        )
        torch.manual_seed(0)
        trainer.train()
        return parameters_of(trainer.student)

    assert largest_difference(train("random"), train("least_squares")) == 0


def test_projections_are_not_fitted_again_on_resume(make_trainer, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer("whole", losses=hidden(), loss_weights={}, **settings)
    whole.train()
    resumed = make_trainer("resumed", losses=hidden(), loss_weights={}, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert largest_difference(parameters_of(resumed.model), parameters_of(whole.model)) == 0


def test_least_squares_needs_data_that_can_be_read_by_index(make_trainer):
    data = IterableDataset.from_generator(lambda: iter(make_dataset()))
    trainer = make_trainer(losses=hidden(), loss_weights={}, data=data, max_steps=1)
    with pytest.raises(ValueError, match="projection_init least_squares needs training data with a length"):
        trainer.train()


@pytest.mark.parametrize("usual", [0.0, 0.2])
def test_projections_have_their_own_weight_decay_and_their_biases_none(make_trainer, usual):
    trainer = make_trainer(weight_decay=usual, projection_weight_decay=0.05)
    optimizer = trainer.create_optimizer()
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(trainer.model.named_parameters())
    assert decays.keys() == {id(parameter) for parameter in named.values()}
    for name, parameter in named.items():
        if name.startswith("objective."):
            assert decays[id(parameter)] == (0.0 if name.endswith("bias") else 0.05), name
        elif not name.endswith("bias") and "norm" not in name.lower():
            assert decays[id(parameter)] == usual, name


def test_training_twice_keeps_one_set_of_groups_and_fits_once(make_trainer, tmp_path):
    settings = {"projection_learning_rate_factor": 2.0, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer = make_trainer(losses=hidden(), loss_weights={}, **settings)
    trainer.train()
    groups = len(trainer.optimizer.param_groups)
    assert all(group["params"] for group in trainer.optimizer.param_groups)
    trained = parameters_of(trainer.model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert len(trainer.optimizer.param_groups) == groups
    assert largest_difference(parameters_of(trainer.model), trained) == 0
    before = parameters_of(trainer.objective)
    trainer.args.learning_rate = 1e-12
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    assert largest_difference(parameters_of(trainer.objective), before) < 1e-6


def test_plain_training_arguments_have_the_defaults_of_ours(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, disable_tqdm=True, report_to="none")
    trainer = DistillationTrainer(
        model=make_student(),
        teacher=make_teacher(),
        losses=hidden(),
        args=args,
        train_dataset=make_dataset(),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    assert step_logs(trainer) or trainer.state.global_step == 1


def test_the_objective_is_shown_once_where_training_begins(make_trainer, capsys):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    assert capsys.readouterr().out.count(f"objective: {trainer.objective.formula()}") == 1
