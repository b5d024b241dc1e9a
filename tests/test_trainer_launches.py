"""The whole catalogue of losses under every way to train in one process: what comes out is the same."""

import inspect
import shutil

import numpy as np
import pytest
import torch
from helpers import (
    ALL_WEIGHTS,
    checkpointing,
    largest_difference,
    make_batch,
    make_dataset,
    make_student,
    make_teacher,
    make_tokenizer,
    parameters_of,
    reference_kl,
    seeded,
    step_logs,
)
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, TrainerCallback

from distill_nlp import HiddenStateLoss, KLDivergenceLoss
from distill_nlp import trainer as trainer_module
from distill_nlp.losses import LOSSES
from distill_nlp.losses.projections import Projections

# Losses that relate the rows of a micro-batch to each other; all others are means over rows.
RELATIONAL = ("rkd_distance", "rkd_angle", "similarity")
MEANS = tuple(name for name in LOSSES if name not in RELATIONAL)
# Of DIST only the part within each row.
SETTINGS = {"dist": {"intra_weight": 0.0}, "kl": {"temperature": 2.0}, "hidden": {"layers": [[0, 0], [1, 2], [2, 4]]}}


def catalogue(names=MEANS) -> dict:
    return {name: LOSSES[name](**SETTINGS.get(name, {})) for name in names}


def every_weight(names=MEANS) -> dict:
    """All different, so that no two can be mistaken for each other."""
    return {name: 0.1 + 0.05 * i for i, name in enumerate(names)}


def train_catalogue(make_trainer, name, names=MEANS, resume_from=None, **settings):
    defaults = {
        "losses": catalogue(names),
        "loss_weights": every_weight(names),
        "data": make_dataset(14, unlabeled=(0, 1, 2, 3, 9, 13)),
        "optim": "sgd",
        "learning_rate": 0.02,
        # Clipping would hide a gradient of another size.
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 8,
        "max_steps": -1,
        "num_train_epochs": 2,
    }
    trainer = make_trainer(name, **(defaults | settings))
    before = parameters_of(trainer.model)
    trainer.train(resume_from_checkpoint=resume_from)
    assert largest_difference(parameters_of(trainer.model), before) > 1e-3
    return trainer


def terms_of(entry: dict) -> dict:
    return {name: value for name, value in entry.items() if name.startswith("loss")}


# ---- the same whatever the cut, the memory, the precision ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Four steps of 8, 6, 8 and 6 rows at once, some of them without a label."""
    from helpers import make_trainer

    folder = tmp_path_factory.mktemp("whole")
    return train_catalogue(lambda name, **settings: make_trainer(folder / name, **settings), "whole")


def test_the_catalogue_is_trained_as_a_whole(whole):
    assert set(MEANS) | set(RELATIONAL) == set(LOSSES)
    logs = step_logs(whole)
    assert len(logs) == 4
    for entry in logs:
        terms = terms_of(entry)
        assert set(terms) == {"loss", *(f"loss_{name}" for name in MEANS)}
        assert all(np.isfinite(value) and value > 0 for value in terms.values())
    assert {name.split(".")[1] for name in whole.objective.state_dict()} == {"hidden", "pkd", "fsp"}


@pytest.mark.parametrize("size", [4, 2, 1])
def test_accumulation_changes_no_loss_of_the_catalogue(make_trainer, whole, size):
    """1x8 = 2x4 = 4x2 = 8x1, with ragged last steps and rows without a label unevenly spread."""
    cut = train_catalogue(make_trainer, "cut", per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
    assert largest_difference(parameters_of(cut.model), parameters_of(whole.model)) < 1e-5
    for entry, expected in zip(step_logs(cut), step_logs(whole), strict=True):
        assert terms_of(entry) == pytest.approx(terms_of(expected), rel=1e-4)


def test_gradient_checkpointing_changes_no_loss_of_the_catalogue(make_trainer, whole):
    checkpointed = train_catalogue(make_trainer, "checkpointed", **checkpointing())
    assert checkpointed.student.distilbert.transformer.gradient_checkpointing
    assert largest_difference(parameters_of(checkpointed.model), parameters_of(whole.model)) < 2e-6


def test_bfloat16_autocast_is_finite_and_near_float32(make_trainer, whole, monkeypatch):
    """Of the objective nothing is autocast, projections included."""
    dtypes = set()
    project = Projections.project

    def recorded(self, pair, states):
        projected = project(self, pair, states)
        dtypes.add(projected.dtype)
        return projected

    monkeypatch.setattr(Projections, "project", recorded)
    reduced = train_catalogue(make_trainer, "bf16", bf16=True)
    assert dtypes == {torch.float32}
    for entry in step_logs(reduced):
        assert all(np.isfinite(value) for value in terms_of(entry).values())
    assert terms_of(step_logs(reduced)[0]) == pytest.approx(terms_of(step_logs(whole)[0]), rel=0.06)
    for name, tensor in parameters_of(reduced.model).items():
        assert tensor.dtype == torch.float32, name
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("name", [*RELATIONAL, "dist"])
def test_losses_between_rows_train_and_say_that_they_stay_within_a_micro_batch(make_trainer, name):
    trainer = make_trainer(losses={"kl": KLDivergenceLoss(), name: LOSSES[name]()}, per_device_train_batch_size=4)
    before = parameters_of(trainer.student)
    trainer.train()
    assert largest_difference(parameters_of(trainer.student), before) > 1e-3
    assert all(np.isfinite(entry[f"loss_{name}"]) and entry[f"loss_{name}"] > 0 for entry in step_logs(trainer))
    said = f"{inspect.getmodule(LOSSES[name]).__doc__} {LOSSES[name].__doc__}"
    assert "within a micro-batch" in " ".join(said.split())


# ---- best model, resume ----

KINDS = ("linear", "shared", "low_rank", "orthogonal")


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_model_is_loaded_with_projections_of_every_kind(make_trainer, tmp_path, kind):
    """The metric falls, so that the first epoch is the best."""
    scores = iter([0.9, 0.5])
    trainer = make_trainer(
        losses={"hidden": HiddenStateLoss(projection=kind, rank=8), "kl": KLDivergenceLoss()},
        eval_dataset=make_dataset(4, seed=9),
        compute_metrics=lambda _: {"score": next(scores)},
        max_steps=-1,
        num_train_epochs=2,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer.train()
    best, last = tmp_path / "run" / "checkpoint-4", tmp_path / "run" / "checkpoint-8"
    for part, file in ((trainer.student, "model.safetensors"), (trainer.objective, "objective.safetensors")):
        assert largest_difference(parameters_of(part), load_file(best / file)) == 0
        assert largest_difference(parameters_of(part), load_file(last / file)) > 1e-3


SCHEDULED = {
    "hidden": {"schedule": "range", "value": 1.0, "until": 0.5},
    "kl": {"schedule": "cosine", "start": 1.0, "end": 0.2},
    "attention": 0.5,
    "ce": 0.3,
    "fsp": 0.1,
}


def scheduled_losses(kind: str = "linear") -> dict:
    return {
        "hidden": LOSSES["hidden"](projection=kind, rank=8, projection_init="least_squares"),
        "kl": LOSSES["kl"](temperature={"schedule": "linear", "start": 4.0, "end": 1.0}),
        "attention": LOSSES["attention"](),
        "ce": LOSSES["ce"](),
        "fsp": LOSSES["fsp"](),
    }


def run_scheduled(make_trainer, name, resume_from=None, kind="linear", **settings):
    """Eight steps in two shuffled epochs with dropout; the checkpoints at 3 and 6 lie inside an epoch."""
    defaults = {
        "student": make_student(dropout=0.1),
        "losses": scheduled_losses(kind),
        "loss_weights": SCHEDULED,
        "data": make_dataset(16, unlabeled=(1, 6)),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": -1,
        "num_train_epochs": 2,
        "train_sampling_strategy": "random",
        "lr_scheduler_type": "linear",
        "learning_rate": 1e-3,
        "loss_balancing": "gradient_norm",
        "term_gradient_norm_steps": 2,
        "projection_learning_rate_factor": 5.0,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    trainer = make_trainer(name, **(defaults | settings))
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer


def without_times(entry: dict) -> dict:
    return {name: value for name, value in entry.items() if name.startswith(("loss", "weight", "grad", "learning"))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [3, 6])
def test_resuming_with_schedules_balance_and_least_squares_is_exact(make_trainer, tmp_path, step, kind):
    """Step 3 lies before the weight that ends half-way, step 6 after it."""
    first = run_scheduled(make_trainer, "whole", kind=kind)
    resumed = run_scheduled(make_trainer, "resumed", str(tmp_path / "whole" / f"checkpoint-{step}"), kind=kind)
    later = [without_times(entry) for entry in step_logs(first)[step:]]
    assert len(later) == 8 - step
    assert [without_times(entry) for entry in step_logs(resumed)[step:]] == later
    assert largest_difference(parameters_of(resumed.model), parameters_of(first.model)) == 0
    assert resumed.objective.balance.factors.ne(1).any()


def test_projections_are_fitted_at_the_start_only(make_trainer, tmp_path, monkeypatch):
    """A resumed training takes them from the checkpoint, and does not run the models for them once more."""
    fits = []
    fit = trainer_module.fit_projections
    monkeypatch.setattr(trainer_module, "fit_projections", lambda *args: (fits.append(1), fit(*args)))
    run_scheduled(make_trainer, "whole")
    assert len(fits) == 1
    run_scheduled(make_trainer, "resumed", str(tmp_path / "whole" / "checkpoint-3"))
    assert len(fits) == 1


def test_scheduled_weights_are_those_of_their_formulas_and_in_the_log(make_trainer):
    logs = step_logs(run_scheduled(make_trainer, "plain", loss_balancing="none", term_gradient_norm_steps=0))
    assert [("loss_hidden" in entry) for entry in logs] == [True] * 4 + [False] * 4
    for step, entry in enumerate(logs):
        # The log comes after the step, with the weights that it was made with.
        expected = 0.2 + 0.8 * (1 + np.cos(np.pi * step / 8)) / 2
        assert entry["weight_kl"] == pytest.approx(expected, rel=1e-5)
        assert entry["weight_hidden"] == (1.0 if step < 4 else 0.0)
        weights = {name: entry.get(f"weight_{name}", SCHEDULED[name]) for name in SCHEDULED}
        total = sum(weight * entry.get(f"loss_{name}", 0.0) for name, weight in weights.items())
        assert entry["loss"] == pytest.approx(total, rel=1e-4)


def test_the_balance_is_in_the_total(make_trainer):
    """In steps without measurement, the weights in the log are those that the step was made with."""
    logs = step_logs(run_scheduled(make_trainer, "balanced"))[1::2]
    assert len(logs) == 4
    for entry in logs:
        total = sum(entry[f"weight_{name}"] * entry.get(f"loss_{name}", 0.0) for name in SCHEDULED)
        assert entry["loss"] == pytest.approx(total, rel=1e-4)
        assert all(abs(entry[f"weight_{name}"] / SCHEDULED[name] - 1) > 1e-3 for name in ("attention", "ce"))


def test_a_scheduled_temperature_follows_the_steps(make_trainer):
    """With a learning rate of 0 and the same rows in each step, only the temperature changes."""
    student, teacher = make_student(dropout=0.0), make_teacher()
    losses = {"kl": LOSSES["kl"](temperature={"schedule": "linear", "start": 4.0, "end": 1.0})}
    trainer = make_trainer(
        student=student, teacher=teacher, losses=losses, loss_weights={}, data=make_dataset(4), learning_rate=0.0
    )
    batch = make_batch(make_dataset(4))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = student(**inputs).logits, teacher(**inputs, token_type_ids=batch["token_type_ids"]).logits
    trainer.train()
    expected = [reference_kl(*logits, temperature) for temperature in (4.0, 3.25, 2.5, 1.75)]
    assert [entry["loss_kl"] for entry in step_logs(trainer)] == pytest.approx(expected, rel=1e-4)


# ---- torch.compile ----


def same_length(tokenizer=None) -> DataCollatorWithPadding:
    """Every batch of the same shape: another shape is compiled anew."""
    return DataCollatorWithPadding(tokenizer or make_tokenizer(), padding="max_length", max_length=12)


COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class GraphCount(TrainerCallback):
    """How many graphs there were after each step."""

    def __init__(self):
        self.counts = []
        torch._dynamo.utils.counters.clear()

    def on_step_end(self, args, state, control, **kwargs):
        self.counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_a_compiled_student_learns_the_same(make_trainer, tmp_path):
    """Also saved as a plain student, and resumed."""
    settings = {"data": make_dataset(16, unlabeled=(0, 1, 9)), "data_collator": same_length(), "num_train_epochs": 1}
    plain = train_catalogue(make_trainer, "plain", **settings)
    graphs = GraphCount()
    settings |= {"save_strategy": "steps", "save_steps": 1} | COMPILED
    compiled = train_catalogue(make_trainer, "compiled", callbacks=[graphs], **settings)
    assert graphs.counts[-1] > 0
    assert largest_difference(parameters_of(compiled.student), parameters_of(plain.student)) < 1e-5
    assert largest_difference(parameters_of(compiled.objective), parameters_of(plain.objective)) < 1e-5
    for entry, expected in zip(step_logs(compiled), step_logs(plain), strict=True):
        assert terms_of(entry) == pytest.approx(terms_of(expected), rel=1e-4)

    compiled.save_model(str(tmp_path / "saved"))
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert {name: keys for name, keys in info.items() if keys} == {}
    assert largest_difference(parameters_of(model), parameters_of(compiled.student)) == 0

    checkpoint = str(tmp_path / "compiled" / "checkpoint-1")
    resumed = train_catalogue(make_trainer, "resumed", resume_from=checkpoint, **settings)
    assert [entry["step"] for entry in step_logs(resumed)] == [1, 2]
    assert largest_difference(parameters_of(resumed.student), parameters_of(compiled.student)) < 1e-6
    assert largest_difference(parameters_of(resumed.objective), parameters_of(compiled.objective)) < 1e-6


SCHEDULES = {
    "weight": ({"kl": {"schedule": "linear", "start": 1.0, "end": 0.5}}, 2.0),
    "temperature": ({}, {"schedule": "linear", "start": 4.0, "end": 1.0}),
    "neither": ({}, 2.0),
}


@pytest.mark.parametrize("changing", SCHEDULES)
def test_a_schedule_does_not_compile_anew_at_each_step(make_trainer, changing):
    weights, temperature = SCHEDULES[changing]
    graphs = GraphCount()
    trainer = make_trainer(
        losses={"ce": LOSSES["ce"](), "kl": LOSSES["kl"](temperature=temperature)},
        loss_weights=weights,
        data_collator=same_length(),
        callbacks=[graphs],
        max_steps=8,
        num_train_epochs=2,
        **COMPILED,
    )
    trainer.train()
    assert len(graphs.counts) == 8
    assert graphs.counts[0] > 0
    # One graph more at most, when the number is first seen to change.
    assert graphs.counts[-1] == graphs.counts[1] <= 2 * graphs.counts[0]
    if changing == "neither":
        assert graphs.counts[-1] == graphs.counts[0]


def test_gradient_norms_of_a_compiled_student_are_those_of_the_plain_one(make_trainer):
    logs = {}
    for name, settings in (("plain", {}), ("compiled", COMPILED)):
        trainer = make_trainer(
            name, data_collator=same_length(), max_steps=2, term_gradient_norm_steps=1, optim="sgd", **settings
        )
        trainer.train()
        logs[name] = step_logs(trainer)
    for entry, expected in zip(logs["compiled"], logs["plain"], strict=True):
        norms = {name: value for name, value in expected.items() if name.startswith("gradient_norm_")}
        assert len(norms) == 4
        assert {name: entry[name] for name in norms} == pytest.approx(norms, rel=1e-3)


def test_a_compiled_student_trains_with_balanced_gradients(make_trainer):
    """The compiled backward reads the factors that its own forward had."""
    results = {}
    for name, settings in (("plain", {}), ("compiled", COMPILED)):
        trainer = make_trainer(
            name,
            losses=catalogue(("ce", "kl")),
            data_collator=same_length(),
            max_steps=4,
            optim="sgd",
            loss_balancing="gradient_norm",
            term_gradient_norm_steps=2,
            **settings,
        )
        trainer.train()
        results[name] = parameters_of(trainer.model)
    assert largest_difference(results["compiled"], results["plain"]) < 1e-5


def test_gradient_norms_of_some_steps_only_leave_a_compiled_backward_whole(make_trainer):
    """A graph that was compiled in a step without measurement is gone through once per term in one with it."""
    trainer = make_trainer(
        losses={
            "kl": LOSSES["kl"](temperature={"schedule": "linear", "start": 4.0, "end": 1.0}),
            "attention": LOSSES["attention"](),
            "fsp": LOSSES["fsp"](),
        },
        loss_weights={},
        data_collator=same_length(),
        max_steps=4,
        term_gradient_norm_steps=2,
        **COMPILED,
    )
    trainer.train()
    assert [("gradient_norm_kl" in entry) for entry in step_logs(trainer)] == [True, False, True, False]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_learns_the_same(make_trainer):
    losses = ("ce", "kl", "hidden")
    settings = {"data_collator": same_length(), "max_steps": 2, "optim": "sgd"}
    plain = make_trainer("plain", losses=catalogue(losses), **settings)
    compiled = make_trainer("compiled", losses=catalogue(losses), torch_compile=True, **settings)
    assert compiled.args.torch_compile_backend == "inductor"
    for trainer in (plain, compiled):
        trainer.train()
    assert largest_difference(parameters_of(compiled.student), parameters_of(plain.student)) < 1e-5


# ---- PEFT ----

TARGETS = {"distilbert": ["q_lin", "v_lin"], "bert": ["query", "value"]}
HEADS = {"distilbert": ["pre_classifier", "classifier"], "bert": ["classifier"]}


def base_student(family: str):
    if family == "distilbert":
        return make_student(dropout=0.0)
    return make_teacher(seed=2, hidden_size=24, num_attention_heads=3, num_hidden_layers=2, dropout=0.0)


def lora_student(family: str = "distilbert", rank: int = 4, base=None):
    """B is not 0 at the start, so that A has a gradient at once."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=rank,
        target_modules=TARGETS[family],
        modules_to_save=HEADS[family],
        init_lora_weights=False,
    )
    return seeded(7, lambda: peft.get_peft_model(base_student(family) if base is None else base, config))


def trained(name: str) -> bool:
    return name.startswith("objective.") or "lora_" in name or "modules_to_save" in name


@pytest.mark.parametrize("family", TARGETS)
def test_of_a_peft_student_only_adapters_head_and_projections_move(make_trainer, family):
    trainer = make_trainer(student=lora_student(family))
    before = parameters_of(trainer.model)
    trainer.train()
    moved = {name for name, tensor in parameters_of(trainer.model).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if trained(name)}
    assert {name.split(".")[0] for name in moved} == {"student", "objective"}
    assert all(entry[f"loss_{name}"] > 0 for entry in step_logs(trainer) for name in ALL_WEIGHTS)


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("name", ["hidden", "attention", "token_relation"])
def test_losses_of_inner_layers_reach_the_adapters(make_trainer, family, name):
    trainer = make_trainer(student=lora_student(family), losses={name: LOSSES[name]()}, optim="sgd", max_steps=1)
    before = parameters_of(trainer.student)
    trainer.train()
    after = parameters_of(trainer.student)
    adapters = {name for name in before if "lora_" in name}
    # A map of the last layer does not depend on that layer's values.
    blind = {n for n in adapters if name == "attention" and ".1." in n and ("v_lin" in n or "value" in n)}
    assert len(blind) == (2 if name == "attention" else 0)
    assert {n for n in adapters if not torch.equal(after[n], before[n])} == adapters - blind
    assert all(torch.equal(after[n], before[n]) for n in before if "modules_to_save" in n)


def test_a_peft_bert_gets_both_segments(make_trainer):
    trainer = make_trainer(student=lora_student("bert"))
    batch = make_batch()
    trainer.model.eval()
    logits = trainer.model(**batch).logits
    assert torch.equal(logits, trainer.student(**batch).logits)
    one_segment = trainer.model(**batch | {"token_type_ids": torch.zeros_like(batch["token_type_ids"])}).logits
    assert (logits - one_segment).abs().max() > 1e-3
    seen = []
    trainer.student.get_base_model().bert.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("token_type_ids")), with_kwargs=True
    )
    trainer.train()
    assert len(seen) == 4
    assert all(ids.any() for ids in seen)


@pytest.mark.parametrize("family", TARGETS)
def test_a_peft_student_is_saved_as_its_adapter_and_loads_on_the_base(make_trainer, tmp_path, family):
    peft = pytest.importorskip("peft")
    base_student(family).save_pretrained(tmp_path / "base")
    trainer = make_trainer(student=lora_student(family))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert not files & {"model.safetensors", "objective.safetensors", "training_args.bin"}
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    batch = make_batch()
    trainer.model.eval()
    own = {name: tensor for name, tensor in batch.items() if family == "bert" or name != "token_type_ids"}
    with torch.no_grad():
        assert torch.equal(loaded(**own).logits, trainer.model(**batch).logits)


def test_resuming_a_peft_student_is_exact(make_trainer, tmp_path):
    first = run_scheduled(make_trainer, "whole", student=lora_student())
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    files = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "objective.safetensors"} <= files
    assert "model.safetensors" not in files
    resumed = run_scheduled(make_trainer, "resumed", str(checkpoint), student=lora_student())
    assert largest_difference(parameters_of(resumed.model), parameters_of(first.model)) == 0
    later = [without_times(entry) for entry in step_logs(first)[3:]]
    assert [without_times(entry) for entry in step_logs(resumed)[3:]] == later


def test_the_best_adapter_is_loaded_at_the_end(make_trainer, tmp_path):
    scores = iter([0.9, 0.5])
    trainer = make_trainer(
        student=lora_student(),
        eval_dataset=make_dataset(4, seed=9),
        compute_metrics=lambda _: {"score": next(scores)},
        max_steps=-1,
        num_train_epochs=2,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer.train()
    peft = pytest.importorskip("peft")
    adapter = peft.get_peft_model_state_dict(trainer.student)
    best, last = (load_file(tmp_path / "run" / f"checkpoint-{i}" / "adapter_model.safetensors") for i in (4, 8))
    assert largest_difference(adapter, best) == 0
    assert largest_difference(adapter, last) > 1e-3


@pytest.mark.parametrize("other", ["rank", "targets", "plain"])
def test_a_checkpoint_of_another_adapter_is_refused(make_trainer, tmp_path, other):
    peft = pytest.importorskip("peft")
    first = make_trainer("first", student=lora_student(), max_steps=1, save_strategy="steps", save_steps=1)
    first.train()
    if other == "rank":
        student = lora_student(rank=2)
    elif other == "plain":
        student = make_student(dropout=0.0)
    else:
        config = peft.LoraConfig(
            task_type="SEQ_CLS", r=4, target_modules=["q_lin"], modules_to_save=HEADS["distilbert"]
        )
        student = peft.get_peft_model(make_student(dropout=0.0), config)
    checkpoint = tmp_path / "first" / "checkpoint-1"
    with pytest.raises(ValueError, match="cannot load the checkpoint") as error:
        make_trainer("second", student=student).train(resume_from_checkpoint=str(checkpoint))
    said = {"rank": "lora", "targets": "the adapter has other weights than the student's", "plain": "no model"}
    assert said[other] in str(error.value)


@pytest.mark.parametrize("names", [["task"], ["default", "other"]])
def test_adapters_that_a_checkpoint_would_not_hold_are_refused(make_trainer, names):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=TARGETS["distilbert"])
    student = peft.get_peft_model(make_student(dropout=0.0), config, adapter_name=names[0])
    for name in names[1:]:
        student.add_adapter(name, config)
    with pytest.raises(ValueError, match=f'must have one adapter named "default", got {", ".join(names)}'):
        make_trainer(student=student)
