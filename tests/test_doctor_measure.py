"""Bytes and seconds of a step, memory, plan, and that nothing is left behind."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from helpers import all_losses, largest_difference, make_batch, make_dataset, make_student, make_teacher, parameters_of

from distill_nlp import CrossEntropyLoss, KLDivergenceLoss
from distill_nlp.doctor import measure
from distill_nlp.doctor.measure import (
    Step,
    StepTime,
    activation_bytes,
    batches_by_length,
    features_bytes,
    saved_bytes,
    time_answers,
    time_step,
)
from distill_nlp.doctor.memory import (
    MemoryEstimate,
    check_memory,
    estimate_memory,
    forward_peak,
    free_memory,
    tensor_bytes,
)
from distill_nlp.doctor.plan import StageTime, check_time, duration, evaluations
from distill_nlp.doctor.trace import no_trace
from distill_nlp.modeling import DistillationModel
from distill_nlp.objective import DistillationObjective
from distill_nlp.outputs import Features
from distill_nlp.teacher import bind_teacher

MB = 1_000_000


def make_step(losses=None, autocast=None, answer=None, **student):
    objective = DistillationObjective(all_losses() if losses is None else losses)
    teacher = make_teacher()
    model = DistillationModel(make_student(**student), objective, teacher.config)
    if objective.needs_teacher and answer is None:
        answer = bind_teacher(teacher, model.config, objective)
    return Step(model, answer, autocast)


def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    names = ("input_ids", "token_type_ids", "attention_mask")
    batch = {n: torch.tensor([row[n] + [0] * (width - len(row[n])) for row in rows]) for n in names}
    return batch | {"labels": torch.tensor([row["labels"] for row in rows])}


@pytest.fixture
def row():
    return max(make_dataset(), key=lambda row: len(row["input_ids"]))


# ---- bytes kept for backward ----


def test_each_storage_counts_once_and_parameters_not_at_all():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8))

        def forward(self, teacher, input_ids):
            made = input_ids * self.weight  # keeps the batch and the weight
            squared = made * made  # keeps made, twice
            cosine = squared.view(2, 4).cos()  # keeps squared
            # Both keep squared or cosine; the second a view of the weight too.
            return type("Output", (), {"loss": squared.sin().sum() + (cosine * self.weight.view(2, 4)).sum()})

    assert saved_bytes(Step(Model(), None), {"input_ids": torch.rand(8)}) == 3 * 8 * 4


def test_what_the_teacher_handed_over_is_not_the_students():
    batch = make_batch()
    step = make_step({"kl": KLDivergenceLoss()})
    plain = make_step({"ce": CrossEntropyLoss()})
    logits = batch["labels"].numel() * 3 * 4
    assert abs(saved_bytes(step, batch) - saved_bytes(plain, batch)) <= 12 * logits


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("losses", ["all", "ce"])
def test_the_estimate_is_that_of_a_full_batch(row, losses, autocast):
    step = make_step(None if losses == "all" else {"ce": CrossEntropyLoss()}, autocast)
    estimated = activation_bytes(step, row, collate, 24)
    counted = saved_bytes(step, collate([row] * 24))
    assert estimated == pytest.approx(counted, rel=0.05)
    assert counted > 10 * saved_bytes(step, collate([row] * 2)) * 0.8


def test_the_estimate_is_close_to_the_tensors_of_a_block_counted_by_hand():
    # A linear layer of a batch keeps its input and no more: B x H_in numbers.
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(50, 7)

        def forward(self, teacher, input_ids):
            return type("Output", (), {"loss": self.layer(input_ids.sin()).sum()})

    step = Step(Model(), None)
    found = activation_bytes(step, None, lambda rows: {"input_ids": torch.rand(len(rows), 50)}, 1000)
    assert found == 1000 * 50 * 4


def test_checkpointing_keeps_less(row):
    whole, checkpointed = make_step(), make_step()
    checkpointed.model.activation_checkpointing_enable()
    assert activation_bytes(checkpointed, row, collate, 16) < 0.6 * activation_bytes(whole, row, collate, 16)


def test_the_teachers_features_are_counted(row):
    objective = DistillationObjective({"kl": KLDivergenceLoss()})
    model = DistillationModel(make_student(), objective, make_teacher().config)
    states = torch.zeros(2, 5, 32)

    def answer(batch):
        return Features(torch.zeros(2, 3), hidden_states={1: states, 2: states}, pooled={(1, "first"): states[:, 0]})

    assert features_bytes(Step(model, answer), row, collate, 8) == 4 * (2 * 3 + 2 * 5 * 32) * 4
    assert features_bytes(Step(model, None), row, collate, 8) == 0


# ---- time ----


class Clock:
    """Steps on by what each call costs."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class FakeStep:
    """Takes a second per token, two for the teacher and half a second to update."""

    device = torch.device("cpu")

    def __init__(self, clock, per_token=1.0):
        self.clock, self.per_token, self.rows = clock, per_token, []

    def ask(self, batch):
        self.clock.now += 2 * self.per_token * batch["input_ids"].numel()
        return "answer"

    def gradient(self, batch, teacher):
        assert teacher == "answer"
        self.rows.append(len(batch["input_ids"]))
        self.clock.now += self.per_token * batch["input_ids"].numel()

    def update(self):
        self.clock.now += 0.5


def batch_of(position, count):
    """Batches of 2, 6 and 10 tokens a row by position."""
    return {"input_ids": torch.zeros(count, {1 / 6: 2, 1 / 2: 6, 5 / 6: 10}[position])}


def test_with_time_enough_whole_batches_of_all_lengths_are_timed():
    clock = Clock()
    step = FakeStep(clock)
    found = time_step(step, batch_of, 8, 10_000, clock)
    assert step.rows == [2, 2] + [8] * 15
    assert found == StepTime(2 * 8 * 6, 8 * 6, 0.5, 15, 8)


@pytest.mark.parametrize("seconds", [400, 150, 30, 0])
def test_with_little_time_small_batches_are_scaled_by_their_tokens(seconds):
    clock = Clock()
    step = FakeStep(clock)
    found = time_step(step, batch_of, 32, seconds, clock)
    assert max(step.rows) < 32
    assert found.gradient == pytest.approx(32 * 6)
    assert found.answers == pytest.approx(2 * 32 * 6)
    # The two that warm up, and one batch in any case.
    assert clock.now <= max(seconds * 1.6, 3 * (36 + 0.5))


@pytest.mark.parametrize(("most", "rows"), [(32, 32), (9, 8)])
def test_an_accelerator_is_timed_on_whole_batches_that_fit_and_when_it_is_warm(monkeypatch, most, rows):
    """Two rows take it as long as many, and a shape that it has not met takes longest."""
    monkeypatch.setattr(measure, "_synchronize", lambda device: None)
    clock = Clock()

    class Accelerator(FakeStep):
        device = torch.device("cuda")

        def ask(self, batch):
            if len(batch["input_ids"]) > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            shape = batch["input_ids"].shape
            self.clock.now += 0.02 if shape in self.met else 50
            self.met.add(shape)
            return "answer"

        def gradient(self, batch, teacher):
            self.rows.append(len(batch["input_ids"]))
            self.clock.now += 0.01

    step = Accelerator(clock)
    step.met = set()
    found = time_step(step, batch_of, 32, 10.0, clock)
    # What warming takes is not taken from the timing.
    assert found.batches == 15
    assert set(step.rows) == {rows}
    assert found.rows == rows
    # Half a second for each update.
    assert found.answers == pytest.approx(0.02 * 32 / rows, rel=0.5)
    assert found.gradient == pytest.approx(0.01 * 32 / rows, rel=0.5)


def test_a_batch_of_one_row_is_timed():
    clock = Clock()
    assert time_step(FakeStep(clock), batch_of, 1, 1000, clock).rows == 1


def test_the_teachers_time_is_that_of_one_row(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measure.time, "perf_counter", clock)
    step = FakeStep(clock)
    assert time_answers(step.ask, batch_of(1 / 2, 4), 4, step.device) == 2 * 6


def test_a_step_is_its_micro_batches_and_one_update():
    assert StepTime(1.0, 2.0, 0.5, 3, 8).of_step(4) == 12.5


def test_real_steps_take_time_and_leave_the_weights(row):
    step = make_step()
    before = parameters_of(step.model)
    found = time_step(step, batches_by_length(list(make_dataset()), collate, grouped=True), 4, 5.0)
    assert found.gradient > 0
    assert found.answers > 0
    assert largest_difference(before, parameters_of(step.model)) == 0
    assert time_answers(step.answer, collate([row]), 1, step.device) > 0


def test_grouped_batches_are_of_like_lengths_and_random_ones_are_not():
    rows = list(make_dataset(rows=64))
    grouped = batches_by_length(rows, collate, grouped=True)
    widths = [grouped(position, 8)["input_ids"].shape for position in (0.0, 0.5, 1.0)]
    assert widths[0][1] < widths[1][1] < widths[2][1]
    assert all(width[0] == 8 for width in widths)
    assert widths[0][1] == 4
    assert widths[2][1] == 12
    mixed = batches_by_length(rows, collate, grouped=False)
    assert mixed(0.0, 8)["input_ids"].shape[1] > 9


def test_a_sample_smaller_than_a_batch_is_repeated():
    rows = list(make_dataset(rows=3))
    assert batches_by_length(rows, collate, grouped=True)(0.5, 8)["input_ids"].shape[0] == 8


# ---- memory ----


def test_an_estimate_counts_weights_gradients_and_two_moments():
    model = torch.nn.Linear(10, 10)
    found = estimate_memory(model, activations=1000, teacher_weights=50, teacher_peak=7)
    assert found == MemoryEstimate(440, 440, 880, 50, 1000, 7)
    assert found.total == 440 + 440 + 880 + 50 + 1000 + 7


def test_frozen_weights_have_no_gradients():
    model = torch.nn.Linear(10, 10)
    model.weight.requires_grad_(False)
    found = estimate_memory(model, 0)
    assert (found.weights, found.gradients, found.moments) == (440, 40, 80)


@pytest.mark.parametrize(("sharded", "expected"), [(False, (440, 880, 880)), (True, (110, 110, 220))])
def test_ranks_keep_buckets_or_share(sharded, expected):
    found = estimate_memory(torch.nn.Linear(10, 10), 0, ranks=4, sharded=sharded)
    assert (found.weights, found.gradients, found.moments) == expected


def test_the_bytes_of_tensors_follow_their_type():
    assert tensor_bytes([torch.zeros(3, dtype=torch.bfloat16), torch.zeros(2, 2)]) == 6 + 16


@pytest.mark.parametrize("make", [make_teacher, make_student])
def test_the_teachers_peak_follows_its_widths(make):
    config = make().config
    width, inner = config.hidden_size, 48 if make is make_teacher else 32
    assert forward_peak(config, rows=2, tokens=3, element_size=2) == 2 * 3 * 2 * (2 * width + 2 * inner)
    assert forward_peak(object(), 2, 3) == 0


@pytest.mark.parametrize(("free", "level"), [(130, "ok"), (125, "ok"), (124, "warning"), (84, "warning"), (83, "stop")])
def test_the_share_of_the_free_memory_decides(free, level):
    estimate = MemoryEstimate(10 * MB, 10 * MB, 20 * MB, 0, 60 * MB, 0)
    found = check_memory(estimate, free * MB, "system", 16, 256, accumulation=2)
    assert found.level == level
    assert "about 100 MB: weights 10 MB" in found.what
    assert "teacher" not in found.what
    assert f"{free} MB free (system)" in found.what
    if level != "ok":
        assert "--training.per_device_train_batch_size 8 --training.gradient_accumulation_steps 4" in found.fix
        assert "--training.gradient_checkpointing true" in found.fix
        assert "--training.precision bf16" in found.fix


def test_no_fix_is_named_that_is_on_already():
    estimate = MemoryEstimate(1, 1, 1, 1, 1, 1)
    fix = check_memory(estimate, 1, "GPU", 1, 256, checkpointing=True, bf16=True).fix
    assert fix == "a smaller --data.max_length"


def test_ranks_on_one_machine_share_its_memory():
    estimate = MemoryEstimate(10 * MB, 0, 0, 0, 0, 0)
    assert check_memory(estimate, 30 * MB, "system", 8, 8, copies=2).level == "ok"
    found = check_memory(estimate, 30 * MB, "system", 8, 8, copies=4)
    assert found.level == "stop"
    assert "about 40 MB" in found.what


def test_unknown_free_memory_is_ok():
    assert "not known" in check_memory(MemoryEstimate(1, 1, 1, 1, 1, 1), None, "mps", 8, 8).what


def files(root, **texts):
    for name, text in texts.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


CPU = torch.device("cpu")


def test_free_memory_is_the_smaller_of_system_and_container(tmp_path):
    files(tmp_path, proc__meminfo="MemTotal: 999 kB\nMemAvailable:   800 kB\n")
    assert free_memory(CPU, tmp_path) == (800 * 1024, "system")
    files(tmp_path, sys__fs__cgroup__memory_dot_max="500000\n", sys__fs__cgroup__memory_dot_current="300000\n")
    assert free_memory(CPU, tmp_path) == (200_000, "container")
    files(tmp_path, sys__fs__cgroup__memory_dot_stat="anon 5\ninactive_file 100000\n")
    assert free_memory(CPU, tmp_path) == (300_000, "container")
    files(tmp_path, sys__fs__cgroup__memory_dot_max="max\n")
    assert free_memory(CPU, tmp_path) == (800 * 1024, "system")


def test_the_older_control_groups_are_read(tmp_path):
    memory = tmp_path / "sys/fs/cgroup/memory"
    memory.mkdir(parents=True)
    (memory / "memory.limit_in_bytes").write_text("900")
    (memory / "memory.usage_in_bytes").write_text("1000")
    assert free_memory(CPU, tmp_path) == (0, "container")
    (memory / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    assert free_memory(CPU, tmp_path) == (None, "system")


def test_this_machine_says_what_is_free():
    free, where = free_memory(CPU)
    assert free is None or free > MB
    assert where in ("system", "container")


# ---- what is left ----


@pytest.mark.parametrize(
    ("strategy", "eval_steps", "expected"),
    [("epoch", None, 4), ("steps", 250, 5), ("steps", 0.1, 11), ("steps", None, 1), ("no", None, 1), ("steps", 300, 4)],
)
def test_evaluations_of_a_training(strategy, eval_steps, expected):
    assert evaluations(strategy, 1000, eval_steps, 2.5) == expected


def test_the_time_of_all_stages_is_added_up():
    stages = [StageTime("teacher", 750, 600.0), *(StageTime("student", 1000, 1200.0) for _ in range(3))]
    found = check_time([*stages, StageTime("report", 0, 60.0)], "9 steps")
    assert found.level == "ok"
    assert found.what == (
        "about 71 min (53 min to 1.8 h): teacher 750 steps, 10 min; student 1,000 steps × 3, 60 min; report 60 s; "
        "an estimate from 9 steps"
    )


def test_more_than_a_day_is_a_warning():
    assert check_time([StageTime("teacher", 10, 86400.0)], "x").level == "ok"
    assert check_time([StageTime("teacher", 10, 86401.0)], "x").level == "warning"


def test_nothing_left_is_said():
    assert "nothing is left" in check_time([], "").what


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (200_000, "2.3 days")],
)
def test_durations_as_people_say_them(seconds, said):
    assert duration(seconds) == said


# ---- no trace ----


@pytest.mark.parametrize("failing", [False, True])
def test_the_random_generators_go_on_as_if_nothing_had_been_drawn(failing):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    expected = draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    try:
        with no_trace():
            assert draw() == expected
            if failing:
                raise RuntimeError
    except RuntimeError:
        pass
    assert draw() == expected
