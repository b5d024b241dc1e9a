"""The benchmark of speed: what it compares trains alike, and its table says what was measured."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import helpers
import pytest
import torch
import torch.nn.functional as F
import yaml

from distill_nlp import DistillationTrainer
from distill_nlp.capture import ATTENTION_NAME
from distill_nlp.cli import main
from distill_nlp.durable_files import write_json

FOLDER = Path(__file__).parent.parent / "benchmarks" / "speed"
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]
import accelerator  # noqa: E402
import capturing  # noqa: E402
import idle  # noqa: E402
import limits  # noqa: E402
import loops  # noqa: E402
import measuring  # noqa: E402
import plain  # noqa: E402
import short  # noqa: E402
import starting  # noqa: E402
import turns  # noqa: E402
import whole  # noqa: E402
import workloads  # noqa: E402
from page_blocks import put_blocks  # noqa: E402

# Not as `run`, which is also the name of another benchmark's.
_spec = importlib.util.spec_from_file_location("speed_run", FOLDER / "run.py")
run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run)

PAIR = workloads.Pair("tiny", torch.device("cpu"))
OPTIONS = argparse.Namespace(
    rows=8, rounds=1, batches="4x64", longest=16, models="tiny", compile=False, tokens=[16], maps="mse", short=[8]
)


def grouped_rows():
    return workloads.random_rows([3, 14, 5, 12, 4, 15, 6, 13])


def test_grouped_batches_hold_each_row_once_and_pad_less():
    data = grouped_rows()
    shares = {}
    for grouped in (False, True):
        batches = workloads.batches_of(data, 4, grouped, seed=1)
        assert sorted(row for batch in batches for row in batch) == list(range(8))
        shares[grouped] = workloads.padded_share(data, batches)
    assert shares[True] == (4 * 15 + 4 * 6) / 72
    assert shares[True] < shares[False]


def test_each_way_on_short_rows_has_a_process_with_its_pages(monkeypatch, students):
    pages, attention = [], []

    def here(function, *arguments):
        pages.append(os.environ["THP_MEM_ALLOC_ENABLE"])
        seconds = function(*arguments)
        attention.append(students[-1].config._attn_implementation)
        return seconds

    monkeypatch.setattr(short, "in_a_process_of_its_own", here)
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    ((title, found),) = run.PART["short"](PAIR, OPTIONS)
    assert "32x8" in title
    assert list(found) == list(short.WAYS)
    assert all(figures["peak_mib"] > 50 for figures in found.values())
    # The round that does not count, and one that does.
    assert pages == 2 * ["0", "0", "1", "0", "1"]
    assert attention == 2 * ["sdpa", ATTENTION_NAME, ATTENTION_NAME, "sdpa", "sdpa"]
    assert "THP_MEM_ALLOC_ENABLE" not in os.environ


def test_the_limit_is_every_product_of_the_students_step_and_nothing_else():
    student = PAIR.student(0.0)
    layers = limits.linear_layers(student, size=4, tokens=64)
    block = [(64, 64, 256)] * 4 + [(256, 64, 256), (64, 256, 256)]
    assert [(*weight.shape, rows) for weight, rows in layers] == [*block, (64, 64, 4), (2, 64, 4)]
    assert not any(module._forward_pre_hooks for module in student.modules())
    # What a step multiplies besides attention, as the utilisation of a GPU counts it: forward, and twice backward.
    products = sum(3 * 2 * weight.numel() * rows for weight, rows in layers[:6])
    attention = 3 * 4 * 64 * 64
    assert products == 4 * 64 * (accelerator.flops_of_a_token(PAIR, 64, with_teacher=False) - attention)


def test_a_step_of_products_runs_each_layer_and_each_attention_once(monkeypatch):
    asked = []

    def told(function, name):
        return lambda *tensors, **more: asked.append((name, tensors[0].dtype)) or function(*tensors, **more)

    for name in ("linear", "scaled_dot_product_attention"):
        monkeypatch.setattr(F, name, told(getattr(F, name), name))
    backward, gradients = torch.autograd.grad, []

    def seen(output, operands, gradient):
        found = backward(output, operands, gradient)
        gradients.append([value.shape for value in found] == [operand.shape for operand in operands])
        return found

    monkeypatch.setattr(torch.autograd, "grad", seen)
    products = limits.Products(bf16=True).on(PAIR, workloads.fixed_rows(8, 64), 4)
    asked.clear()
    assert all(seconds > 0 for seconds in products(0))
    # Two steps of one block and the head.
    products = 8 * [("linear", torch.bfloat16)]
    assert asked == 2 * [*products, ("scaled_dot_product_attention", torch.float32)]
    # Backward to inputs and weights of each.
    assert gradients == 2 * 9 * [True]


def test_the_part_limits_shows_steps_and_what_no_code_goes_below():
    ((title, found),) = run.PART["limits"](PAIR, OPTIONS)
    assert title == "tiny pair, steps of 4x64, 16 rows"
    assert list(found) == list(limits.WAYS)
    assert found["plain Trainer subclass: fp32, teacher live"]["ratio"] == 1


def test_the_validation_rows_say_what_the_teacher_says_as_many_as_the_doctor_asks(tmp_path):
    from datasets import load_dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    places = starting.write_material(PAIR, tmp_path, rows=2000)
    data = load_dataset(str(places["data"]))
    assert {name: len(rows) for name, rows in data.items()} == {"train": 2000, "validation": 200, "test": 32}
    teacher = AutoModelForSequenceClassification.from_pretrained(places["teacher"])
    rows = data["validation"]
    margins = starting._margins(teacher, AutoTokenizer.from_pretrained(places["teacher"]), rows["text"][:])
    # The one in the middle lies on the boundary, where rounding decides.
    assert sum((margins > 0).long() == torch.tensor(rows["label"][:])) >= 199
    assert sum(rows["label"][:]) in (99, 100, 101)


@pytest.mark.slow
def test_the_way_to_the_first_step_is_that_of_plain_code_and_of_run(monkeypatch):
    """Each in a process, which ends at the first step: else it would end with what the training says."""
    monkeypatch.setattr(starting, "IMPORTS", {"python -c pass": "pass"})

    def once(ways, rounds):
        """Without the passes that are not counted."""
        return measuring.compared({name: [way(0)] for name, way in ways.items()})

    monkeypatch.setattr(starting, "measured", once)
    (_, imports), (title, found) = starting.tables(PAIR, 48, 1)
    assert imports["python -c pass"]["cpu_ratio"] == 1
    assert "tiny pair, 48 rows" in title
    assert list(found) == list(starting.STARTS)
    assert all(figures["seconds"] > 1 for figures in found.values())


def test_a_process_that_fails_is_said(monkeypatch):
    with pytest.raises(SystemExit, match="exit code 3: .*no teacher"):
        starting._process(lambda: "import sys; print('no teacher', file=sys.stderr); sys.exit(3)")(0)


def test_bare_loops_and_trainers_have_their_tokens_per_second_and_memory(monkeypatch):
    monkeypatch.setattr(accelerator, "in_a_process_of_its_own", lambda function, *arguments: function(*arguments))
    # The compiler takes a minute.
    ways = {name: way for name, way in accelerator.WAYS.items() if "compiled" not in name}
    monkeypatch.setattr(accelerator, "WAYS", ways)
    ((title, found),) = run.PART["accelerator"](PAIR, argparse.Namespace(**vars(OPTIONS) | {"shapes": "4x16"}))
    assert title == "tiny pair, 2 steps of 4x16, bf16"
    assert list(found) == ["bare loop, teacher live", "DistillationTrainer, KL", "DistillationTrainer, KL, cached"]
    for figures in found.values():
        assert figures["tokens_per_second"] == pytest.approx(8 * 16 / figures["seconds"])
        assert figures["utilisation"] is None
        assert 0.05 < figures["peak_gib"] < 50


def test_the_work_of_a_token_is_that_of_its_matrix_products():
    """BERT-base and DistilBERT-base at 256 tokens: 85 million weights in blocks, half of them in the student."""
    pair = workloads.Pair("base", torch.device("cpu"))
    products = 2 * 12 * 768**2 + 2 * 2 * 256 * 768
    assert accelerator.flops_of_a_token(pair, 256) == products * (12 + 3 * 6)
    assert accelerator.flops_of_a_token(pair, 256, with_teacher=False) == products * 3 * 6
    student = pair.student(0.0)
    blocks = sum(p.numel() for n, p in student.named_parameters() if ".layer." in n and p.dim() == 2)
    assert accelerator.flops_of_a_token(pair, 0, with_teacher=False) == 6 * blocks


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_devices_peak_is_its_own(name, peak):
    assert accelerator.peak_of_device(name) == peak


@pytest.fixture
def students(monkeypatch):
    """The students that are made from now on; they have no dropout."""
    found, make = [], workloads.Pair.student

    def student(self, attention_dropout):
        made = make(self, attention_dropout)
        for module in made.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        found.append(made)
        return made

    monkeypatch.setattr(workloads.Pair, "student", student)
    return found


@pytest.fixture
def after(students):
    """`after(way)`: the student's weights when a way has trained once over the rows."""

    def train(way):
        seconds, busy = way.on(PAIR, grouped_rows(), 8)(0)
        assert seconds > 0
        assert busy > 0
        return [parameter.detach().clone() for parameter in students[-1].parameters()]

    return train


WHOLE = loops.Bare(attention_dropout=0.0)


@pytest.mark.parametrize(
    "way",
    [
        replace(WHOLE, fused=True),
        replace(WHOLE, parts=4),
        replace(WHOLE, parts=4, teacher_at_once=True),
        replace(WHOLE, grouped=True),
        replace(WHOLE, quick_attention=True),
        loops.Trained("plain", attention_dropout=0.0),
        loops.Trained(attention_dropout=0.0),
        loops.Trained(attention_dropout=0.0, teacher="cached"),
    ],
    ids=[
        "fused",
        "parts",
        "parts, teacher at once",
        "grouped",
        "quick attention",
        "plain Trainer",
        "ours",
        "ours, cached",
    ],
)
def test_ways_that_should_train_alike_do(after, way):
    """All rows are one batch: the order cannot matter."""
    pairs = list(zip(after(way), after(WHOLE), strict=True))
    start = [parameter.detach() for parameter in PAIR.student(0.0).parameters()]
    moved = sum(float((a - b).abs().sum()) for (a, _), b in zip(pairs, start, strict=True))
    apart = sum(float((a - b).abs().sum()) for a, b in pairs)
    assert moved > 0
    # Adam makes a full step of gradients that are rounding: a few entries may go another way.
    assert apart < 0.02 * moved


@pytest.mark.parametrize("part", ["steps", "defaults", "capture", "relations"])
def test_each_part_gives_a_table(part, monkeypatch):
    monkeypatch.setattr(capturing, "peak", lambda way, *_: {"eager": 50, "capture": 20, "kl": 10}[way.way] * 2**20)
    for title, found in run.PART[part](PAIR, OPTIONS):
        text = measuring.table(title, found)
        assert all(f"| {name} | " in text for name in found)
        assert next(iter(found.values()))["ratio"] == 1
        assert all(figures["seconds"] > 0 for figures in found.values())


def test_rows_of_steps_may_have_the_lengths_of_reviews():
    options = argparse.Namespace(**vars(OPTIONS) | {"batches": "4x64,imdb"})
    (fixed, rows, size), (drawn, reviews, of_reviews) = run._rows_of(options)
    assert (fixed, len(rows), size) == ("4x64", 16, 4)
    assert "cut at 16" in drawn
    assert (len(reviews), of_reviews) == (8, 16)
    assert max(map(len, reviews["input_ids"])) == 16
    # Matrix products alone are of rows of one length.
    assert [title for title, _ in run.PART["limits"](PAIR, options)] == ["tiny pair, steps of 4x64, 16 rows"]


def test_a_round_starts_with_another_variant_and_ratios_are_of_one_round():
    asked = []

    def takes(name, seconds):
        def once(seed):
            asked.append(name)
            return seconds * max(seed, 1), 1.0

        return once

    found = measuring.measured({"a": takes("a", 2.0), "b": takes("b", 3.0)}, rounds=3)
    assert asked == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert found["b"]["range"] == [1.5, 1.5]
    assert found["b"]["seconds"] == 6.0


def test_the_quickest_passes_are_compared_whatever_their_rounds():
    found = measuring.compared({"a": [(4.0, 1.0), (2.0, 1.0)], "b": [(3.0, 1.0), (9.0, 1.0)]})
    assert [figures["quickest_ratio"] for figures in found.values()] == [1.0, 1.5]
    assert found["b"]["ratio"] == pytest.approx((3 / 4 + 9 / 2) / 2)
    assert measuring.compared({"a": [(4.0, 1.0)]})["a"]["quickest_ratio"] is None


@pytest.mark.parametrize(
    ("given", "part", "shown"),
    [
        (
            ["--parts", "steps", "--json", "/home/someone/speed.json", "--rows", "8", "--write", "--json=/home/x"],
            None,
            "--parts steps --rows 8",
        ),
        (
            [
                "--compile",
                "--data",
                "/home/a",
                "--teacher=/home/b",
                "--parts=steps,whole",
                "--work",
                "/home/c",
            ],
            "whole",
            "--parts whole --compile --data DATA --teacher CHECKPOINT --work DIR",
        ),
        (["--settings", "--training.bf16 true"], "whole", "--parts whole --settings '--training.bf16 true'"),
        (["--compile", "--rounds", "2"], "levers", "--parts levers --compile --rounds 2"),
    ],
)
def test_the_command_that_is_shown_holds_no_path_of_this_machine(given, part, shown):
    assert run.shown_command(given, part) == f"python benchmarks/speed/run.py {shown}"


# ---- attention losses by capture and by eager maps ----


@pytest.mark.parametrize("layers", ["uniform", "last"])
@pytest.mark.parametrize("maps", ["mse", "kl", "relations"])
def test_capture_and_eager_maps_give_the_same_loss_and_gradients(students, layers, maps, monkeypatch):
    # Of several layers each has another partner.
    monkeypatch.setitem(workloads.MODELS, "tiny", (64, 2, 4, 2))
    batch = workloads.fixed_rows(3, 12).with_format("torch")[:]
    found = []
    for way in ("capture", "eager"):
        _, loss_of = capturing.Featured(way, layers, maps).loss_on(PAIR)
        loss = loss_of(batch)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in students[-1].parameters() if p.grad is not None]))
    (captured, gradients), (eager, others) = found
    torch.testing.assert_close(captured, eager, rtol=1e-5, atol=1e-7)
    assert len(gradients) == len(others) > 10
    for a, b in zip(gradients, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    _, alone = capturing.Featured("kl").loss_on(PAIR)
    assert float(alone(batch).detach()) < float(captured)


def test_only_the_eager_way_asks_for_maps_of_eager_attention(students, monkeypatch):
    teachers, make = [], workloads.Pair.teacher
    monkeypatch.setattr(workloads.Pair, "teacher", lambda self: teachers.append(make(self)) or teachers[-1])
    for way in ("eager", "capture", "kl"):
        capturing.Featured(way).loss_on(PAIR)
    attention = [
        (s.config._attn_implementation, t.config._attn_implementation) for s, t in zip(students, teachers, strict=True)
    ]
    assert attention[0] == ("eager", "eager")
    assert not any("eager" in name for names in attention[1:] for name in names)


def test_memory_is_that_above_the_divergence_alone(monkeypatch):
    monkeypatch.setattr(capturing, "peak", lambda way, *_: {"eager": 50, "capture": 20, "kl": 10}[way.way] * 2**20)
    found = capturing.costs(PAIR, 2, 8, 2, "last", "kl", rounds=1)
    assert found["capture"]["above_kl_mib"] == 10
    assert found["capture"]["memory_ratio"] == 0.25
    assert "memory_ratio" not in found["KL alone"]
    monkeypatch.setattr(capturing, "peak", lambda way, *_: {"eager": 11, "capture": 20, "kl": 10}[way.way] * 2**20)
    assert capturing.costs(PAIR, 2, 8, 2, "last", "kl", rounds=1)["capture"]["memory_ratio"] is None


@pytest.mark.slow
def test_the_peak_of_a_step_is_measured_in_a_process_of_its_own():
    """The maps alone are 2 x 64 x 2 x 256 x 256 x 4 bytes = 64 MiB in the teacher."""
    peaks = {way: capturing.peak(capturing.Featured(way), PAIR, 64, 256) for way in ("eager", "kl")}
    assert peaks["eager"] > peaks["kl"] + 60 * 2**20
    assert peaks["kl"] > 0


# ---- whole runs ----


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_the_plain_loss_is_the_weighted_sum(make_student, make_teacher, tmp_path, ce_weight):
    student, teacher = make_student(dropout=0.0), make_teacher()
    arguments = helpers.make_arguments(tmp_path)
    trainer = plain.PlainDistiller(student, arguments, teacher=teacher, ce_weight=ce_weight, kl_weight=0.7)
    batch = helpers.make_batch()
    batch.pop("token_type_ids")
    labels, inputs = batch["labels"], {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits, target = (model.eval()(**inputs).logits for model in (student, teacher))
    p, q = ((z.double() / plain.TEMPERATURE).softmax(-1) for z in (target, logits))
    expected = 0.7 * plain.TEMPERATURE**2 * (p * (p / q).log()).sum(-1).mean()
    expected = expected + ce_weight * F.cross_entropy(logits.double(), labels)
    loss = trainer.compute_loss(student.train(), dict(batch))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.requires_grad
    # In evaluation the teacher does not run.
    trainer.teacher = None
    evaluated = trainer.compute_loss(student.eval(), dict(batch))
    assert evaluated.item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.fixture
def runs(experiment, tmp_path, monkeypatch, no_doctor):
    """`runs(**changes)`: the options of the part, on tiny models and rows; its processes run in this one."""
    settings = yaml.safe_load(experiment(losses={"ce": {}, "kl": {}}, seeds=[7]).read_text())
    settings["training"] = {"per_device_train_batch_size": 16}
    settings["teacher"]["training"] = {"max_steps": 2, "eval_strategy": "no"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    commands = []

    def timed(together, folder):
        seconds = []
        for command in together:
            commands.append(command)
            if command[1] == "-m":
                assert main(command[3:]) == 0
            elif command[1].endswith("idle.py"):
                write_json(command[2], idle.pieces_of(command[3:]))
            else:
                plain.main(command[2:])
            seconds.append((10.0 + len(commands), 1.0))
        return seconds

    monkeypatch.setattr(whole, "RECIPE", recipe)
    monkeypatch.setattr(whole, "timed_in_turns", timed)
    places = {"data": tmp_path / "data", "teacher": tmp_path / "backbone", "work": tmp_path / "work"}

    def options(**changes):
        return argparse.Namespace(**places | {"seeds": [0], "epochs": 1.0, "longest": 16, "settings": ""} | changes)

    options.commands = commands
    return options


def test_whole_runs_are_timed_once_with_accuracy(runs, tmp_path):
    ((title, both),) = whole.tables(runs())
    assert "40 train, 12 validation, 16 test" in title
    # The teacher took 11 s, then came the plain way, 12 s, and ours.
    assert both[whole.PLAIN]["seconds"] == 12
    assert both[whole.OURS]["ratio"] == pytest.approx(13 / 12)
    accuracies = [figures["accuracy"] for figures in both.values()]
    assert [len(found) for found in accuracies] == [1, 1, 1]
    assert all(0 <= found[0] <= 1 and found[0] * 16 == int(found[0] * 16) for found in accuracies)

    # Again: what is finished is not done again. With another setting both students are, and the teacher is not.
    count = len(runs.commands)
    ((_, again),) = whole.tables(runs())
    assert len(runs.commands) == count == 3
    assert again[whole.OURS]["seconds"] == 13
    next(iter(whole.tables(runs(settings="--training.bf16 true"))))
    assert len(runs.commands) == 5
    assert runs.commands[-1][-2:] == ["--training.bf16", "true"]


def test_stages_of_a_run_are_timed_with_their_pieces(runs, tmp_path):
    step = DistillationTrainer.training_step
    (title, stages), (_, pieces) = whole.stage_tables(runs())
    assert "40 train, 12 validation, 16 test" in title
    assert (tmp_path / "work" / "stages" / "run" / "report.md").is_file()
    assert "--stages" not in runs.commands[0]
    assert DistillationTrainer.training_step is step
    found = json.loads((tmp_path / "work" / "stages" / "pieces.json").read_text())
    trained = {idle.FORWARD, idle.STEP, idle.RUN}
    assert {name: set(own) for name, own in found.items()} == {
        "teacher": trained | {idle.EVALUATION},
        "baseline": trained | {idle.EVALUATION},
        "student": trained | {idle.EVALUATION, idle.ANSWERS},
        "report": {idle.ANSWERS, idle.SPEED, idle.RUN},
    }
    assert all(value > 0 for own in found.values() for value in own.values())

    # The process is timed from outside.
    assert list(stages) == ["teacher", "baseline", "student", "report", idle.AROUND, idle.RUN]
    assert stages[idle.RUN]["seconds"] == 11
    assert stages[idle.AROUND] == {
        "seconds": pytest.approx(11 - sum(own[idle.RUN] for own in found.values())),
        "share": pytest.approx(stages[idle.AROUND]["seconds"] / 11),
        "idle": 1.0,
    }
    work = sum(value for own in found.values() for name, value in own.items() if name != idle.RUN)
    assert stages[idle.RUN]["idle"] == pytest.approx(1 - work / 11)
    assert sum(stages[name]["idle"] * stages[name]["seconds"] for name in (*idle.STAGES, idle.AROUND)) == pytest.approx(
        pieces[idle.IDLE]["seconds"]
    )
    assert sum(figures["seconds"] for name, figures in pieces.items() if name != idle.RUN) == pytest.approx(11)
    assert "| clipping and optimizer |" in measuring.table("", pieces)

    # Again: what is finished is not done again.
    assert list(whole.stage_tables(runs()))[1][1] == pieces
    assert len(runs.commands) == 1


def test_both_ways_start_from_the_same_weights(runs, monkeypatch):
    started = []
    train = plain.Trainer.train

    def keep(trainer, *arguments, **settings):
        student = getattr(trainer, "student", trainer.model)
        started.append({name: p.detach().clone() for name, p in student.named_parameters()})
        return train(trainer, *arguments, **settings)

    monkeypatch.setattr(plain.Trainer, "train", keep)
    found = whole.WholeRuns(runs())
    found.make_teacher()
    started.clear()
    found.both(3, ours_first=True)
    ours, other = started
    assert ours.keys() == other.keys()
    assert all(torch.equal(ours[name], other[name]) for name in ours)


def test_a_process_that_fails_ends_the_benchmark_and_leaves_no_time(runs, monkeypatch, tmp_path):
    def failing(commands, folder):
        raise SystemExit("exit code 2 of: it")

    monkeypatch.setattr(whole, "timed_in_turns", failing)
    with pytest.raises(SystemExit, match="exit code 2"):
        next(iter(whole.tables(runs())))
    assert not list((tmp_path / "work").rglob("*.json"))


def test_what_was_killed_begins_anew(runs, tmp_path):
    found = whole.WholeRuns(runs())
    found.make_teacher()
    folders = found.student_folder(0), found.plain_folder(0)
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "half-written").touch()
    found.both(0)
    for folder in folders:
        assert (folder / "model.safetensors").is_file()
        assert not (folder / "half-written").exists()
    # The time of a student that is made again under other settings is not that of the one before.
    more = whole.WholeRuns(runs(settings="--training.bf16 true"))
    more.both(0)
    assert json.loads((tmp_path / "work" / "seed-0" / "student.json").read_text())["command"][-1] == "true"
    # Both were timed by turns: where one is missing, the other's time is of no use.
    (tmp_path / "work" / "seed-0" / "plain.json").unlink()
    count = len(runs.commands)
    more.both(0)
    assert len(runs.commands) == count + 2


def test_each_seed_begins_with_the_other_way(runs, monkeypatch):
    asked = []
    monkeypatch.setattr(whole.WholeRuns, "make_teacher", lambda self: (1.0, 1.0))

    def once(self, *pieces):
        asked.extend(name for name, _, _ in pieces)
        return [(2.0 + int("seed-1" in name) if "student" in name else 4.0, 1.0) for name, _, _ in pieces]

    monkeypatch.setattr(whole.WholeRuns, "_once", once)
    monkeypatch.setattr(whole.WholeRuns, "accuracy", lambda self, folder: len(folder.parts) / 100)
    _, found = next(iter(whole.tables(runs(seeds=[0, 1]))))
    assert asked == ["seed-0/plain", "seed-0/student", "seed-1/student", "seed-1/plain"]
    assert found[whole.OURS]["range"] == [0.5, 0.75]
    assert found[whole.OURS]["accuracy"][0] > found[whole.PLAIN]["accuracy"][0]


def test_only_the_outermost_piece_inside_a_stage_counts():
    watch = idle.Stopwatch()
    step = watch.piece(idle.STEP, lambda: None)
    evaluation = watch.piece(idle.EVALUATION, step)
    evaluation()
    assert watch.seconds == {}
    watch.stage("teacher", evaluation)()
    watch.stage("student", step)()
    step()
    assert {name: list(own) for name, own in watch.seconds.items()} == {
        "teacher": [idle.EVALUATION, idle.RUN],
        "student": [idle.STEP, idle.RUN],
    }


def test_an_idle_share_of_a_run_that_failed_or_did_a_part_is_none(runs, tmp_path):
    with pytest.raises(SystemExit, match="ended with code 2"):
        idle.pieces_of(["run", str(tmp_path / "nothing.yaml")])
    found = whole.WholeRuns(runs())
    found.make_teacher()
    # The teacher is there: nothing is done.
    with pytest.raises(SystemExit, match=r"ended with code 0; not run: \['teacher', 'baseline'"):
        idle.pieces_of(runs.commands[0][3:])


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"data": "nowhere"}, "expected a folder with files train, validation, test of the columns text and label"),
        ({"data": "backbone"}, "expected a folder with files train, validation, test"),
        ({"data": "several"}, "expected a folder with files train, validation, test"),
        ({"teacher": "data"}, "found no config.json"),
        ({"teacher": "finished"}, "is a classifier for these labels already"),
    ],
)
def test_what_does_not_serve_is_refused_in_one_line(runs, tmp_path, place, said):
    helpers.write_rows_of_several_labels(tmp_path / "several")
    helpers.make_teacher(**helpers.label_config(helpers.BINARY)).save_pretrained(tmp_path / "finished")
    helpers.make_tokenizer().save_pretrained(tmp_path / "finished")
    with pytest.raises(SystemExit, match=said) as error:
        next(iter(whole.tables(runs(**{name: tmp_path / folder for name, folder in place.items()}))))
    assert "\n" not in str(error.value)


TICKING = """
import os, sys, time
open(sys.argv[1] + ".pid", "w").write(str(os.getpid()))
path, seconds = sys.argv[1], float(sys.argv[2])
while time.process_time() < seconds:
    print(time.time(), file=open(path, "a"))
    end = time.process_time() + 0.001
    while time.process_time() < end:
        pass
    time.sleep(0.001)
raise SystemExit(int(sys.argv[3]))
"""


def ticking(path, seconds, code=0):
    return [sys.executable, "-c", TICKING, str(path), str(seconds), str(code)]


@pytest.mark.slow
def test_commands_take_turns_and_only_their_own_count(tmp_path):
    places, start = [tmp_path / "a", tmp_path / "b"], time.perf_counter()
    found = turns.timed_in_turns([ticking(path, 0.4) for path in places], tmp_path, turn=0.3)
    elapsed = time.perf_counter() - start
    assert all(cpu >= 0.4 and wall >= 0.4 for wall, cpu in found)
    assert sum(wall for wall, _ in found) == pytest.approx(elapsed, abs=0.1)
    ticks = sorted((float(tick), path.name) for path in places for tick in path.read_text().split())
    changes = sum(one != other for (_, one), (_, other) in pairwise(ticks))
    # Were both running at once, it would change with every other tick.
    assert 2 <= changes <= len(ticks) / 5


@pytest.mark.slow
def test_a_command_that_fails_ends_the_others(tmp_path):
    failing, other = ticking(tmp_path / "a", 0.1, code=3), ticking(tmp_path / "b", 60)
    with pytest.raises(SystemExit, match="exit code 3 of: ") as error:
        turns.timed_in_turns([other, failing], tmp_path, turn=0.3)
    assert shlex.join(failing) in str(error.value)
    assert (tmp_path / "b").read_text()
    # Not even as a zombie.
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "b.pid").read_text()), 0)


# ---- the page ----


def test_a_part_that_was_run_takes_its_place_and_the_others_stay(tmp_path, monkeypatch):
    page = tmp_path / "SPEED.md"
    page.write_text(
        "above\n<!-- speed: begin -->\n<!-- part start -->\nold start\n\n<!-- part steps -->\nold steps\n"
        "<!-- speed: end -->\nbelow\n"
    )
    monkeypatch.setattr(run, "PAGE", page)
    figures = {"a": {"seconds": 1.0, "ratio": 1.0, "range": [1.0, 1.0]}, "b": {"seconds": 2.0, "ratio": None}}
    monkeypatch.setitem(run.PART, "start", lambda pair, options: [("new start", figures)])
    monkeypatch.setitem(run.PART, "levers", lambda pair, options: [("new levers", figures)])
    json_file = tmp_path / "speed.json"
    words = ["run.py", "--parts", "levers,start", "--rounds", "2", "--write", "--json", str(json_file)]
    monkeypatch.setattr("sys.argv", words)
    run.main()
    text = page.read_text()
    parts = ["above\n<!-- speed: begin -->", "part levers", "--parts levers --rounds 2\n", "**new levers**"]
    parts += ["part start", "--parts start --rounds 2\n", "**new start**", "part steps -->\nold steps"]
    places = [text.index(part) for part in [*parts, "<!-- speed: end -->\nbelow\n"]]
    assert places == sorted(places)
    assert "old start" not in text
    assert text.count("| a | 1.00 | 1.00 | 1.00 … 1.00 |\n| b | 2.00 |  |  |") == 2
    assert json.loads(json_file.read_text())["levers"]["new levers"] == figures
    run.main()
    assert page.read_text() == text


def test_a_page_without_marks_is_not_written(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- speed: begin -->\nno end\n")
    with pytest.raises(SystemExit, match="has no lines"):
        put_blocks(page, "speed", "part", {"steps": "table"})
    assert page.read_text() == "<!-- speed: begin -->\nno end\n"


def test_the_page_has_a_block_for_each_part_that_was_measured():
    there = (FOLDER.parent / "SPEED.md").read_text(encoding="utf-8").partition("<!-- speed: begin -->")[2]
    blocks = there.partition("<!-- speed: end -->")[0].split("<!-- part ")[1:]
    names = [block.partition(" -->")[0] for block in blocks]
    assert names == sorted(set(names) & set(run.PART))
    assert all("python benchmarks/speed/run.py --parts" in block for block in blocks)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--parts", "steps,nonsense"], "unknown: nonsense; there are steps, "),
        (["--parts", "whole", "--data", "x"], "the parts whole and stages need --data, --teacher and --work"),
        (["--parts", "whole", "--seeds", "a"], "invalid"),
    ],
)
def test_arguments_that_do_not_serve_are_refused(words, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run.py", *words])
    with pytest.raises(SystemExit) as error:
        run.main()
    assert error.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("compiled", [False, True])
def test_the_compiled_student_is_a_lever_on_request(compiled, monkeypatch):
    asked = {}
    monkeypatch.setattr(run, "measured", lambda passes, rounds: asked.update(passes) or {})
    monkeypatch.setattr(loops.Bare, "on", lambda way, pair, data, size: way.compiled)
    list(run.levers(PAIR, argparse.Namespace(**vars(OPTIONS) | {"compile": compiled})))
    assert sum(asked.values()) == compiled
    assert len(asked) == len(loops.LEVERS) + compiled
