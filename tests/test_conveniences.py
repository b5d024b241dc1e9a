"""Freezing, learning rates by layer, early stopping and trackers in whole trainings, and a stage's dry run."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from helpers import (
    LABELS,
    checkpointing,
    free_port,
    largest_difference,
    make_dataset,
    make_student,
    make_teacher,
    make_tokenizer,
    make_trainer,
    parameters_of,
    step_logs,
)
from safetensors.torch import save_file
from torch.distributed.fsdp import StateDictType
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs

from distill_nlp import CrossEntropyLoss, HiddenStateLoss, KLDivergenceLoss, stage_training
from distill_nlp.combinations import refuse_unsaved, refuse_where_sharded
from distill_nlp.config import TrainingSection
from distill_nlp.errors import DistillError, UsageError
from distill_nlp.losses.cross_entropy import balanced_class_weights
from distill_nlp.objective import DistillationObjective
from distill_nlp.stage_training import TrainingJob
from distill_nlp.stages import StageFolder
from distill_nlp.trainer import DistillationTrainer
from distill_nlp.training_end import take_over_the_end
from distill_nlp.training_settings import training_arguments

HEAD = ("pre_classifier.", "classifier.")


def logits_losses() -> dict:
    return {"ce": CrossEntropyLoss(), "kl": KLDivergenceLoss(temperature=2.0)}


def moved(before: dict, after: dict) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


class Snapshots(TrainerCallback):
    """The student's weights after each step."""

    def __init__(self) -> None:
        self.of_step = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.of_step.append(parameters_of(model.student))


class Interruption(Exception):
    pass


# ---- frozen parts ----


@pytest.mark.parametrize("every", [None, 100], ids=["for good", "not yet"])
def test_frozen_parts_do_not_move_and_all_others_do(tmp_path, every):
    """Weight decay would move what has a gradient of zero."""
    trainer = make_trainer(tmp_path, freeze=["embeddings", "layer.1"], unfreeze_every=every, weight_decay=0.5)
    before = parameters_of(trainer.model)
    trainer.train()
    frozen = {name for name in before if "embeddings" in name or "layer.0." in name}
    assert moved(before, parameters_of(trainer.model)) == before.keys() - frozen
    assert all(parameter.requires_grad for parameter in trainer.student.parameters())


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_accumulation_steps": 2, **checkpointing()}, {"max_grad_norm": 0.0}]
)
def test_what_waits_for_its_turn_is_as_if_it_were_frozen_for_good(tmp_path, settings):
    """In the norms that gradients are clipped to and that the terms have, too."""
    common = {"weight_decay": 0.3, "max_grad_norm": 0.05, "freeze": ["body"], "term_gradient_norm_steps": 1} | settings
    waiting = make_trainer(tmp_path / "a", unfreeze_every=100, **common)
    frozen = make_trainer(tmp_path / "b", **common)
    for trainer in (waiting, frozen):
        trainer.train()
    assert largest_difference(parameters_of(waiting.model), parameters_of(frozen.model)) == 0
    logs = [step_logs(trainer) for trainer in (waiting, frozen)]
    measured = [name for name in logs[0][0] if "grad" in name]
    assert len(measured) > 2
    for name in measured:
        norms = [[entry[name] for entry in log] for log in logs]
        assert norms[0] == pytest.approx(norms[1], rel=1e-6), name
    assert min(entry["grad_norm"] for entry in logs[0]) > 0.05


def test_parts_are_released_one_by_one_from_the_top_down(tmp_path):
    shots = Snapshots()
    settings = {"freeze": ["body"], "unfreeze_every": 2, "max_steps": 8, "weight_decay": 0.1}
    trainer = make_trainer(tmp_path, losses=logits_losses(), callbacks=[shots], **settings)
    states = [parameters_of(trainer.student)]
    trainer.train()
    states += shots.of_step
    released = HEAD
    for turn, part in enumerate([(), ("distilbert.transformer.layer.1.",), ("distilbert.transformer.layer.0.",)]):
        released += part
        for step in (2 * turn, 2 * turn + 1):
            assert moved(states[step], states[step + 1]) == {n for n in states[0] if n.startswith(released)}, step
    still = moved(states[6], states[7]) | moved(states[7], states[8])
    # The rows of words that do not occur have a gradient of zero.
    assert still == states[0].keys()


def test_releasing_is_as_one_training_after_the_other(tmp_path):
    """Without momentum, a reference: each part of the way is a training of its own that freezes less."""
    common = {"losses": logits_losses(), "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.1}
    gradual = make_trainer(tmp_path, freeze=["body"], unfreeze_every=1, max_steps=4, **common)
    gradual.train()
    student, data = make_student(dropout=0.0), make_dataset()
    for step, parts in enumerate([["body"], ["embeddings", "layer.1"], ["embeddings"], []]):
        rows = data.select(range(4 * step, 4 * step + 4))
        make_trainer(tmp_path, student=student, data=rows, max_steps=1, freeze=parts, **common).train()
    assert largest_difference(parameters_of(gradual.student), parameters_of(student)) == 0


@pytest.mark.parametrize(
    "settings",
    [{"freeze": ["body"], "unfreeze_every": 2}, {"freeze": ["embeddings"]}, {"layer_learning_rate_decay": 0.5}],
    ids=["gradual", "for good", "layer decay"],
)
@pytest.mark.parametrize("saved", [1, 3])
def test_going_on_from_a_checkpoint_is_exact(tmp_path, settings, saved):
    settings |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear"}
    settings |= {"weight_decay": 0.1, "num_train_epochs": 2, "projection_learning_rate_factor": 3.0}
    whole, resumed = (make_trainer(tmp_path / name, **settings) for name in ("whole", "resumed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{saved}"))
    assert largest_difference(parameters_of(whole.model), parameters_of(resumed.model)) == 0


def test_layer_decay_slows_each_layer_by_its_factor(tmp_path):
    """One step of SGD: the way that a parameter goes is its learning rate times its gradient."""
    ways = []
    for decay in (1.0, 0.5):
        settings = {"losses": logits_losses(), "optim": "sgd", "max_steps": 1, "max_grad_norm": 0.0}
        trainer = make_trainer(tmp_path, layer_learning_rate_decay=decay, gradient_accumulation_steps=2, **settings)
        before = parameters_of(trainer.student)
        trainer.train()
        after = parameters_of(trainer.student)
        ways.append({name: (after[name] - before[name]).double().norm().item() for name in before})
    for name, way in ways[0].items():
        factor = 0.125 if "embeddings" in name else 0.25 if "layer.0." in name else 0.5 if "layer.1." in name else 1
        assert ways[1][name] == pytest.approx(factor * way, rel=1e-3, abs=1e-9), name


def test_freezing_and_layer_decay_go_together(tmp_path):
    trainer = make_trainer(tmp_path, freeze=["embeddings"], layer_learning_rate_decay=0.5, learning_rate=0.02)
    trainer.create_optimizer()
    rates = {round(group["lr"], 9) for group in trainer.optimizer.param_groups}
    assert rates == {0.02, 0.01, 0.005}


def test_a_failed_training_leaves_the_student_as_it_was(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise Interruption

    trainer = make_trainer(tmp_path, freeze=["body"], callbacks=[Interrupt()])
    with pytest.raises(Interruption):
        trainer.train()
    assert all(parameter.requires_grad for parameter in trainer.student.parameters())


def test_training_twice_freezes_twice(tmp_path):
    trainer = make_trainer(tmp_path, freeze=["embeddings"], max_steps=1)
    before = parameters_of(trainer.student)
    trainer.train()
    trainer.train()
    assert not any("embeddings" in name for name in moved(before, parameters_of(trainer.student)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_learn_above_frozen_embeddings_with_gradient_checkpointing(tmp_path, reentrant):
    """A reentrant checkpoint whose inputs have no gradient gives none to what is inside."""
    settings = checkpointing(use_reentrant=reentrant)
    trainer = make_trainer(tmp_path, losses=logits_losses(), freeze=["embeddings"], **settings)
    before = parameters_of(trainer.student)
    trainer.train()
    after = parameters_of(trainer.student)
    assert moved(before, after) == {name for name in before if "embeddings" not in name}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"freeze": ["body"]}, "freeze"),
        ({"layer_learning_rate_decay": 0.9}, "layer_learning_rate_decay"),
        ({"freeze": ["body"], "layer_learning_rate_decay": 0.9}, "layer_learning_rate_decay and freeze"),
    ],
)
def test_sharded_training_refuses_parts(tmp_path, settings, names):
    objective = DistillationObjective(logits_losses())
    plain = SimpleNamespace(distributed_type=DistributedType.NO, state=SimpleNamespace())
    refuse_where_sharded(make_trainer(tmp_path).args, objective, plain, measures=False)
    with pytest.raises(ValueError, match=f"^{names}: FSDP and DeepSpeed put parameters of their own"):
        refuse_where_sharded(make_trainer(tmp_path, **settings).args, objective, plain, measures=False)


def test_what_a_launcher_would_leave_out_in_silence_is_refused(tmp_path):
    def refused(like, **settings):
        arguments = make_trainer(tmp_path, **settings).args
        refuse_where_sharded(arguments, DistillationObjective({"kl": KLDivergenceLoss()}), like, measures=False)

    def launched(kind):
        return SimpleNamespace(distributed_type=kind, state=SimpleNamespace())

    refused(launched(DistributedType.FSDP), on_nonfinite="skip")
    refused(launched(DistributedType.DEEPSPEED))
    with pytest.raises(ValueError, match="^on_nonfinite: DeepSpeed's optimizer takes the step"):
        refused(launched(DistributedType.DEEPSPEED), on_nonfinite="skip")


# Rows 0 to 3 are one rank's first batch.
OF_RANKS = {
    "max_steps": 6,
    "num_train_epochs": 3,
    "optim": "sgd",
    "learning_rate": 0.02,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "freeze": ["body"],
    "unfreeze_every": 2,
    "layer_learning_rate_decay": 0.7,
}


def train_as_rank(rank: int, folder: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shots = Snapshots()
    trainer = make_trainer(
        folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, callbacks=[shots], **OF_RANKS
    )
    before = parameters_of(trainer.student)
    trainer.train()
    torch.save(
        {
            "world_size": trainer.accelerator.num_processes,
            "states": [before, *shots.of_step],
            "model": parameters_of(trainer.model),
        },
        f"{folder}/rank-{rank}.pt",
    )
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_release_the_parts_as_one_process_does(tmp_path):
    torch.multiprocessing.start_processes(
        train_as_rank, args=(str(tmp_path), free_port()), nprocs=2, start_method="spawn"
    )
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1)]
    whole = make_trainer(tmp_path / "whole", per_device_train_batch_size=8, **OF_RANKS)
    whole.train()
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    assert largest_difference(ranks[0]["model"], ranks[1]["model"]) == 0
    assert largest_difference(ranks[0]["model"], parameters_of(whole.model)) < 1e-5
    states = ranks[0]["states"]
    assert moved(states[0], states[2]) == {name for name in states[0] if name.startswith(HEAD)}
    assert moved(states[2], states[4]) == {
        n for n in states[0] if n.startswith((*HEAD, "distilbert.transformer.layer.1."))
    }


# ---- early stopping ----

SCORES = [0.1, 0.5, 0.4, 0.45, 0.5, 0.9, 0.95, 0.3]


def scored_trainer(folder, scores=SCORES, **settings):
    """A trainer whose metric after step n is the n-th score."""
    holder = []

    def score(_):
        return {"score": scores[holder[0].state.global_step - 1]}

    common = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "metric_for_best_model": "score",
        "load_best_model_at_end": True,
        "max_steps": len(scores),
        "num_train_epochs": 2,
    }
    trainer = make_trainer(folder, eval_dataset=make_dataset(4), compute_metrics=score, **(common | settings))
    holder.append(trainer)
    return trainer


@pytest.mark.parametrize(
    ("settings", "stopped", "best"),
    [
        ({"early_stopping_patience": 1}, 3, 2),
        ({"early_stopping_patience": 3}, 5, 2),
        ({"early_stopping_patience": 4}, 8, 7),
        # 0.9 after 0.5 is better by 0.4 only, 0.95 after 0.9 by 0.05.
        ({"early_stopping_patience": 2, "early_stopping_threshold": 0.45}, 3, 2),
        ({}, 8, 7),
    ],
)
def test_training_stops_after_so_many_evaluations_without_improvement(tmp_path, settings, stopped, best):
    trainer = scored_trainer(tmp_path, **settings)
    trainer.train()
    assert trainer.state.global_step == stopped
    assert trainer.state.best_global_step == best
    stops = [c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
    assert len(stops) == ("early_stopping_patience" in settings)


@pytest.mark.parametrize("saved", [1, 2, 3, 4])
def test_a_training_that_goes_on_stops_where_it_would_have_stopped(tmp_path, saved):
    whole = scored_trainer(tmp_path / "whole", early_stopping_patience=3)
    whole.train()
    resumed = scored_trainer(tmp_path / "resumed", early_stopping_patience=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{saved}"))
    assert resumed.state.global_step == whole.state.global_step == 5
    assert largest_difference(parameters_of(whole.model), parameters_of(resumed.model)) == 0


def test_without_a_metric_the_loss_is_watched(tmp_path):
    settings = {"metric_for_best_model": None, "load_best_model_at_end": False, "learning_rate": 1e-12}
    trainer = scored_trainer(tmp_path, early_stopping_patience=2, early_stopping_threshold=0.01, **settings)
    trainer.train()
    assert trainer.state.global_step == 3


# ---- trackers ----


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_every_term_weight_and_gradient_norm_reaches_the_trackers(tmp_path):
    recorder = Recorder()
    weights = {"ce": 0.3, "kl": {"schedule": "linear", "start": 1.0, "end": 0.0}, "hidden": 1.0}
    trainer = make_trainer(
        tmp_path,
        losses=logits_losses() | {"hidden": HiddenStateLoss()},
        loss_weights=weights,
        callbacks=[recorder],
        term_gradient_norm_steps=1,
        loss_balancing="gradient_norm",
        layer_learning_rate_decay=0.9,
        freeze=["embeddings"],
    )
    trainer.train()
    steps = [entry for entry in recorder.seen if "loss" in entry]
    assert len(steps) == 4
    for entry in steps:
        tags = rewrite_logs(entry)
        for name in weights:
            for kind in ("loss", "weight", "gradient_norm"):
                value = tags[f"train/{kind}_{name}"]
                assert isinstance(value, float), (kind, name)
        assert {"train/loss", "train/grad_norm", "train/learning_rate"} <= tags.keys()
        assert all(tag.replace("train/", "").replace("_", "").isalnum() for tag in tags)


# ---- stages ----


def make_job(folder, callbacks=(), model=None, **training) -> TrainingJob:
    stage = StageFolder(folder / "student" / "seed-0")
    settings = {
        "use_cpu": True,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "train_sampling_strategy": "random",
        "logging_steps": 1,
        "learning_rate": 0.01,
    }
    section = TrainingSection(**(settings | training))
    return TrainingJob(
        name="student, seed 0",
        folder=stage,
        fingerprint={"seed": 0},
        model=make_student(dropout=0.0) if model is None else model,
        losses=logits_losses() | {"hidden": HiddenStateLoss()},
        teacher=make_teacher(),
        train=make_dataset(20),
        validation=make_dataset(10, seed=4),
        arguments=training_arguments(section, stage.checkpoints, seed=0),
        tokenizer=make_tokenizer(),
        max_length=12,
        callbacks=callbacks,
    )


@pytest.fixture
def scored(monkeypatch):
    """`scored(job)`: its validation accuracy after step n is the n-th of SCORES."""

    class Step(TrainerCallback):
        now = 0

        def on_step_end(self, args, state, control, **kwargs):
            Step.now = state.global_step

    monkeypatch.setattr(
        stage_training,
        "compute_metrics",
        lambda _: {"accuracy": SCORES[Step.now - 1], "f1_macro": 0.0},
    )

    def prepare(job: TrainingJob) -> TrainingJob:
        job.callbacks = [Step(), *job.callbacks]
        return job

    return prepare


def weights_of(job: TrainingJob) -> dict:
    return parameters_of(type(job.model).from_pretrained(job.folder.path))


def test_a_stage_that_stops_early_says_where_and_why(tmp_path, scored):
    lines = []
    job = scored(make_job(tmp_path, early_stopping_patience=3))
    job.run(lines.append)
    record = job.folder.record()
    assert (record["steps"], record["best_step"]) == (5, 2)
    reason = "validation accuracy has not improved in 3 evaluations; best 0.5000 at step 2"
    assert record["stopped_early"] == {"step": 5, "why": reason}
    assert lines.count(f"student, seed 0      stopped at step 5 of 8: {reason}") == 1
    evaluations = [line for line in lines if "validation accuracy 0" in line and " step " in line]
    assert len([line for line in evaluations if "/8:" in line]) == 5
    assert set(LABELS) == set(type(job.model).from_pretrained(job.folder.path).config.id2label.values())


def test_the_threshold_is_in_the_reason(tmp_path, scored):
    lines = []
    scored(make_job(tmp_path, early_stopping_patience=2, early_stopping_threshold=0.45)).run(lines.append)
    assert any("has not improved by more than 0.45 in 2 evaluations; best 0.5000 at step 2" in line for line in lines)


@pytest.mark.parametrize(("patience", "steps"), [(None, 8), (8, 8), (3, 5)])
def test_a_stage_that_goes_to_its_end_did_not_stop_early(tmp_path, scored, patience, steps):
    """Also where the patience ends with the last step."""
    lines = []
    job = scored(make_job(tmp_path, early_stopping_patience=patience, max_steps=steps))
    job.run(lines.append)
    assert job.folder.record()["stopped_early"] is None
    assert job.folder.record()["steps"] == steps
    assert not any("stopped" in line for line in lines)


class InterruptAt(TrainerCallback):
    """After the checkpoint of this step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Interruption


@pytest.mark.parametrize(("patience", "steps"), [(3, 5), (None, 8)])
@pytest.mark.parametrize("at", [2, 4, "end"])
def test_an_interrupted_stage_ends_where_it_would_have_ended(tmp_path, scored, patience, steps, at):
    """The last checkpoint included, from which the Trainer would take another step."""
    whole = scored(make_job(tmp_path / "whole", early_stopping_patience=patience))
    whole.run(lambda line: None)
    at = steps if at == "end" else at
    interrupted = scored(make_job(tmp_path / "cut", [InterruptAt(at)], early_stopping_patience=patience))
    with pytest.raises(Interruption):
        interrupted.run(lambda line: None)
    resumed = scored(make_job(tmp_path / "cut", early_stopping_patience=patience))
    resumed.run(lambda line: None)
    old, new = whole.folder.record(), resumed.folder.record()
    assert new["resumed_from"] == f"checkpoint-{at}"
    for key in ("steps", "best_step", "stopped_early"):
        assert new[key] == old[key], key
    assert new["validation"]["loss"] == old["validation"]["loss"]
    assert largest_difference(weights_of(whole), weights_of(resumed)) == 0


def test_the_end_is_taken_over_in_a_run_that_was_moved(tmp_path, scored):
    """Its state names the best checkpoint where it lay before."""
    job = scored(make_job(tmp_path / "old", [InterruptAt(8)]))
    with pytest.raises(Interruption):
        job.run(lambda line: None)
    checkpoint = job.folder.last_checkpoint()
    best_at_end = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    best_at_end["eval_dataset"] = make_dataset()
    trainer = make_trainer(tmp_path / "trainer", losses=job.losses, **best_at_end)
    assert take_over_the_end(trainer, checkpoint)
    best, weights = Path(trainer.state.best_model_checkpoint), parameters_of(trainer.student)
    assert best.is_relative_to(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    trainer = make_trainer(tmp_path / "trainer", losses=job.losses, **best_at_end)
    assert take_over_the_end(trainer, tmp_path / "new" / checkpoint.relative_to(tmp_path / "old"))
    assert trainer.state.best_model_checkpoint == str(tmp_path / "new" / best.relative_to(tmp_path / "old"))
    assert largest_difference(parameters_of(trainer.student), weights) == 0


def test_the_callbacks_of_a_job_are_called(tmp_path):
    shots = Snapshots()
    make_job(tmp_path, [shots], max_steps=2).run(lambda line: None)
    assert len(shots.of_step) == 2


def test_a_trackers_files_are_kept_with_the_result(tmp_path):
    """TensorBoard writes into `runs` beside the checkpoints, which go when the stage is finished."""

    class Files(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            folder = os.path.join(args.output_dir, "runs", "now")
            os.makedirs(folder)
            with open(os.path.join(folder, "events"), "w") as file:
                file.write(args.run_name)

    job = make_job(tmp_path, [Files()], max_steps=1)
    job.run(lambda line: None)
    assert (job.folder.path / "runs" / "now" / "events").read_text() == str(job.folder.path)
    # They are not what the result is made of: without them it is as whole as before.
    shutil.rmtree(job.folder.path / "runs")
    assert job.folder.record()["steps"] == 1
    (job.folder.path / "config.json").unlink()
    with pytest.raises(DistillError, match=r"config.json is missing"):
        job.folder.record()


def test_a_stage_refuses_unknown_parts(tmp_path):
    with pytest.raises(UsageError, match="^student, seed 0: freeze: 'layer.9' is no part of the student"):
        make_job(tmp_path, freeze=["layer.9"]).run(lambda line: None)


# ---- dry run ----


def test_a_rehearsal_does_all_and_leaves_nothing(tmp_path):
    seen = []

    class Events(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(("step", state.global_step))

        def on_evaluate(self, args, state, control, **kwargs):
            seen.append(("evaluation", state.global_step))

        def on_save(self, args, state, control, **kwargs):
            seen.append(("checkpoint", state.global_step))

    lines = []
    job = make_job(tmp_path, [Events()], early_stopping_patience=1, layer_learning_rate_decay=0.9)
    before = parameters_of(job.model)
    given = dict(vars(job.arguments))
    job.rehearse(lines.append)
    assert seen == [("step", 1), ("step", 2), ("evaluation", 2), ("checkpoint", 2)]
    assert moved(before, parameters_of(job.model))
    assert list(tmp_path.iterdir()) == []
    assert {key: value for key, value in vars(job.arguments).items() if key in given} == given
    assert len(lines) == 1
    assert lines[0].startswith("student, seed 0      dry run: 2 steps with loss ")
    assert "evaluated on 10 rows, saved and loaded again in" in lines[0]


@pytest.mark.parametrize(
    "settings",
    [{"eval_strategy": "epoch"}, {"eval_strategy": "no"}, {"eval_delay": 5, "logging_steps": 50}],
    ids=["by epoch", "never", "late"],
)
def test_a_rehearsal_evaluates_saves_and_loads_whatever_the_settings(tmp_path, monkeypatch, settings):
    loaded, lines = [], []
    load = DistillationTrainer._load_best_model
    monkeypatch.setattr(
        DistillationTrainer,
        "_load_best_model",
        lambda trainer: loaded.append(trainer.state.best_model_checkpoint) or load(trainer),
    )
    settings = {"per_device_eval_batch_size": 3, "gradient_accumulation_steps": 2} | settings
    make_job(tmp_path, **settings).rehearse(lines.append)
    assert [path.rpartition("/")[2] for path in loaded] == ["checkpoint-2"]
    assert re.search(r"dry run: 2 steps with loss \d\.\d{4} and \d\.\d{4}, evaluated on 3 rows", lines[0])


def test_a_rehearsal_tells_no_tracker(tmp_path, monkeypatch):
    """With a tracker that is not installed, the Trainer would refuse to begin."""
    job = make_job(tmp_path)
    job.arguments.report_to = ["comet_ml"]
    job.rehearse(lambda line: None)
    assert job.arguments.report_to == ["comet_ml"]


def test_a_rehearsal_keeps_an_unfinished_attempt_and_a_finished_stage(tmp_path):
    job = make_job(tmp_path, [InterruptAt(2)])
    with pytest.raises(Interruption):
        job.run(lambda line: None)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    make_job(tmp_path).rehearse(lambda line: None)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_a_rehearsal_that_fails_leaves_nothing_either(tmp_path):
    with pytest.raises(Interruption):
        make_job(tmp_path, [InterruptAt(2)]).rehearse(lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_finds_what_run_would_find(tmp_path):
    student = make_student()
    student.classifier.bias.data.fill_(float("nan"))
    with pytest.raises(DistillError, match="student, seed 0: step 1: the loss .* is NaN"):
        make_job(tmp_path, model=student).rehearse(lambda line: None)
    job = make_job(tmp_path)
    job.max_length = 41
    with pytest.raises(UsageError, match="data.max_length is 41, but the model of the stage student, seed 0 reads at"):
        job.rehearse(lambda line: None)
    job = make_job(tmp_path, freeze=["nothing"])
    with pytest.raises(UsageError, match="freeze: 'nothing' is no part"):
        job.rehearse(lambda line: None)


# ---- class weights ----


def test_balanced_weights_bring_each_class_the_same_part_of_the_loss(tmp_path):
    """With a student that knows nothing, the loss of a row is log C, and the weights have the mean 1."""
    data = make_dataset(16, unlabeled=(1, 6))
    weights = balanced_class_weights(data["labels"], len(LABELS))
    student = make_student(dropout=0.0)
    torch.nn.init.zeros_(student.classifier.weight)
    losses = {"ce": CrossEntropyLoss(class_weights=weights)}
    settings = {"per_device_train_batch_size": 16, "max_steps": 1}
    trainer = make_trainer(tmp_path, student=student, losses=losses, loss_weights={}, data=data, **settings)
    trainer.train()
    assert step_logs(trainer)[0]["loss_ce"] == pytest.approx(torch.tensor(3.0).log().item(), rel=1e-5)


def test_balanced_weights_that_nobody_put_in_numbers_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match='class_weights "balanced" must be put in numbers first'):
        make_trainer(tmp_path, losses={"ce": CrossEntropyLoss(class_weights="balanced")})


def launched_with(state_dict_type):
    plugin = SimpleNamespace(state_dict_type=state_dict_type)
    return SimpleNamespace(distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin))


def test_an_fsdp_that_leaves_no_model_behind_is_refused_before_a_stage_trains():
    refuse_unsaved(SimpleNamespace(state=SimpleNamespace()))
    refuse_unsaved(launched_with(StateDictType.FULL_STATE_DICT))
    with pytest.raises(ValueError, match="leaves no model behind: set fsdp_state_dict_type to FULL_STATE_DICT"):
        refuse_unsaved(launched_with(StateDictType.SHARDED_STATE_DICT))


@pytest.mark.parametrize("left", [None, {}])
def test_a_stage_whose_weights_were_not_written_keeps_its_checkpoints(tmp_path, monkeypatch, left):
    """As under ZeRO-3 without zero3_save_16bit_model: nothing, or of adapters a file with nothing in it."""
    job, whole = make_job(tmp_path), DistillationTrainer.save_model

    def save(trainer, output_dir, *arguments, **settings):
        if Path(output_dir) != job.folder.result:
            whole(trainer, output_dir, *arguments, **settings)
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        if left is not None:
            save_file(left, Path(output_dir) / "adapter_model.safetensors")

    monkeypatch.setattr(DistillationTrainer, "save_model", save)
    with pytest.raises(DistillError, match="no weights were written at the end of training"):
        job.run(lambda line: None)
    assert list(job.folder.checkpoints.glob("checkpoint-*"))
    assert not job.folder.path.exists()


def test_checkpoints_of_other_settings_go_with_a_line(tmp_path):
    earlier = make_job(tmp_path)
    assert earlier.folder.begin({"seed": 1}) == []
    (earlier.folder.checkpoints / "checkpoint-2").mkdir(parents=True)
    assert earlier.folder.begin({"seed": 1}) == []
    said = []
    make_job(tmp_path).run(said.append)
    assert "student, seed 0      settings changed since it was interrupted, so it begins anew (seed: 1 → 0)" in said
    assert earlier.folder.begin({"seed": 2}) == []
