"""The precision that a run takes where its settings name none."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import make_student
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from distill_nlp import precision, settling
from distill_nlp.config_file import load_experiment
from distill_nlp.errors import UsageError
from distill_nlp.pipeline import Pipeline
from distill_nlp.trainer import DistillationTrainer
from distill_nlp.training_settings import mixed_precision, training_arguments

CPU = torch.device("cpu")


@pytest.fixture
def prefers(monkeypatch):
    """`prefers(bf16)`: what a measurement will find; a list grows by one at each."""
    asked: list[int] = []

    def set_to(bf16: bool) -> list[int]:
        def found(make, rows, tokens, device):
            asked.append(tokens)
            return bf16, "bf16: it was measured"

        monkeypatch.setattr(settling, "prefers_bf16", found)
        return asked

    return set_to


# ---- settings ----


@pytest.mark.parametrize(("named", "expected"), [("fp32", "no"), ("bf16", "bf16"), ("fp16", "fp16")])
def test_a_named_precision_is_the_trainers_two_arguments_and_reaches_the_teacher(experiment, named, expected):
    made = load_experiment(experiment(training__precision=named))
    assert not precision.is_open(made)
    assert mixed_precision(made.training) == mixed_precision(made.teacher_training()) == expected


def test_the_teacher_and_a_phase_may_have_their_own(experiment):
    path = experiment(
        training__bf16=True,
        teacher__training={"max_steps": 4, "precision": "fp32"},
        phases=[{"training": {"precision": "fp16"}}, {}],
    )
    made = load_experiment(path)
    assert mixed_precision(made.teacher_training()) == "no"
    assert [mixed_precision(phase.training) for phase in made.student_trainings()] == ["fp16", "bf16"]


@pytest.mark.parametrize("other", ["bf16", "fp16"])
@pytest.mark.parametrize("named", ["auto", "fp32", "bf16"])
def test_two_ways_to_say_it_at_once_are_refused(experiment, named, other):
    path = experiment(training__precision=named, **{f"training__{other}": True})
    with pytest.raises(UsageError, match=f"training.precision: stands beside {other}: leave one of them out"):
        load_experiment(path)


@pytest.mark.parametrize(
    ("in_file", "given", "expected"),
    [
        ({"bf16": True}, {"precision": "fp32"}, "no"),
        ({"fp16": True}, {"precision": "bf16"}, "bf16"),
        ({"precision": "fp32"}, {"bf16": True}, "bf16"),
        ({"precision": "bf16"}, {"fp16": True}, "fp16"),
    ],
)
def test_the_command_line_goes_over_the_file_however_each_says_it(experiment, in_file, given, expected):
    for block in ("training", "teacher.training"):
        path = experiment(**{f"{block.replace('.', '__')}__{name}": value for name, value in in_file.items()})
        made = load_experiment(path, {f"{block}.{name}": value for name, value in given.items()})
        assert mixed_precision(made.teacher_training()) == expected
    with pytest.raises(UsageError, match="training.precision: stands beside bf16"):
        load_experiment(experiment(), {"training.precision": "fp32", "training.bf16": True})


@pytest.mark.parametrize(("shared", "own"), [("bf16", "fp16"), ("fp16", "bf16")])
def test_a_teacher_in_the_other_half_precision(experiment, shared, own):
    made = load_experiment(experiment(training__precision=shared, teacher__training={"max_steps": 4, own: True}))
    assert mixed_precision(made.training) == shared
    assert mixed_precision(made.teacher_training()) == own


def test_an_unknown_precision_is_refused_with_those_there_are(experiment):
    with pytest.raises(UsageError, match="training.precision.*'auto', 'fp32', 'bf16' or 'fp16'"):
        load_experiment(experiment(training__precision="int8"))


@pytest.mark.parametrize(("launcher", "is_open"), [(None, True), ("no", True), ("bf16", False), ("fp16", False)])
def test_a_launcher_that_names_one_decides(experiment, monkeypatch, launcher, is_open):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launcher is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    assert precision.is_open(load_experiment(experiment())) is is_open
    assert precision.is_open(load_experiment(experiment(training__precision="auto"))) is is_open
    assert not precision.is_open(load_experiment(experiment(training__bf16=False)))


@pytest.mark.parametrize("launcher", ["bf16", "fp16"])
def test_fp32_by_name_stands_over_a_launchers_precision(experiment, monkeypatch, tmp_path, launcher):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    own = {"training__precision": "fp32"}
    teachers = {"training__bf16": True, "teacher__training": {"max_steps": 4, "precision": "fp32"}}
    sections = [
        load_experiment(experiment(**own)).training,
        load_experiment(experiment(**own)).teacher_training(),
        load_experiment(experiment(**teachers)).teacher_training(),
        load_experiment(experiment(phases=[{"training": {"precision": "fp32"}}])).student_trainings()[0].training,
    ]
    assert [mixed_precision(section) for section in sections] == ["no"] * 4
    assert [training_arguments(section, tmp_path, 0).mixed_precision for section in sections] == ["no"] * 4
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == launcher
    assert training_arguments(load_experiment(experiment()).training, tmp_path, 0).mixed_precision == launcher


def test_fp32_by_name_is_what_a_run_trains_in(experiment, monkeypatch, no_doctor):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    found = []
    plain = DistillationTrainer.training_step
    monkeypatch.setattr(
        DistillationTrainer,
        "training_step",
        lambda self, *rest: (found.append(self.accelerator.mixed_precision), plain(self, *rest))[1],
    )
    Pipeline(load_experiment(experiment(training__precision="fp32"))).run(("teacher", "student"))
    assert set(found) == {"no"}


def test_deepspeeds_own_settings_decide(experiment, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert precision.is_open(load_experiment(experiment()))
    assert not precision.is_open(load_experiment(experiment(training__deepspeed="zero.json")))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert not precision.is_open(load_experiment(experiment()))


def test_what_is_settled_reaches_all_that_name_nothing(experiment):
    phases = [{"training": {"fp16": True}}, {"training": {"bf16": False}}, {}]
    made = load_experiment(experiment(phases=phases))
    precision.settle_precision(made, True)
    assert not precision.is_open(made)
    assert mixed_precision(made.teacher_training()) == "bf16"
    found = [phase.training for phase in made.student_trainings()]
    assert [(section.bf16, section.fp16) for section in found] == [(False, True), (False, False), (True, False)]


# ---- the measurement ----


def larger_student() -> nn.Module:
    config = BertConfig(vocab_size=50, hidden_size=128, num_hidden_layers=6, num_attention_heads=2)
    config.intermediate_size, config.max_position_embeddings = 512, 32
    return BertForSequenceClassification(config)


@pytest.mark.parametrize(("ratio", "chosen"), [(0.5, True), (0.89, True), (0.9, False), (1.4, False)])
def test_bf16_is_taken_where_a_step_is_clearly_quicker(monkeypatch, ratio, chosen):
    monkeypatch.setattr(precision, "computes_bf16", lambda device: True)
    monkeypatch.setattr(precision, "bf16_ratio", lambda model, rows, tokens, seconds: (ratio, 4))
    found, line = precision.prefers_bf16(larger_student, 16, 20, CPU)
    assert found is chosen
    name = "bf16" if chosen else "fp32"
    assert line == f"{name}: a step in bf16 takes {ratio:.2f} of its time in fp32 on this cpu (4 rows of 20 tokens)"


def test_nothing_is_measured_where_nothing_is_to_gain(monkeypatch):
    monkeypatch.setattr(precision, "bf16_ratio", lambda *arguments: pytest.fail("measured"))
    monkeypatch.setattr(precision, "computes_bf16", lambda device: True)
    assert precision.prefers_bf16(make_student, 16, 20, CPU) == (False, None)
    assert precision.prefers_bf16(lambda: pytest.fail("built"), 16, 20, torch.device("mps")) == (False, None)
    monkeypatch.setattr(precision, "computes_bf16", lambda device: False)
    assert precision.prefers_bf16(lambda: pytest.fail("built"), 16, 20, CPU) == (False, None)


def test_embeddings_do_not_make_a_student_large(monkeypatch):
    monkeypatch.setattr(precision, "computes_bf16", lambda device: True)
    monkeypatch.setattr(precision, "bf16_ratio", lambda *arguments: pytest.fail("measured"))
    student = make_student()
    student.resize_token_embeddings(100_000)
    assert sum(p.numel() for p in student.parameters()) > 1_000_000
    assert precision.prefers_bf16(lambda: student, 16, 20, CPU) == (False, None)


class _Slow(nn.Module):
    """Takes so long for each row in each precision, on a clock of its own."""

    def __init__(self, fp32: float, bf16: float) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=7)
        self.weight = nn.Parameter(torch.ones(1))
        self.seconds = {False: fp32, True: bf16}
        self.rows: list[int] = []
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def forward(self, input_ids, attention_mask):
        self.rows.append(len(input_ids))
        self.now += self.seconds[torch.is_autocast_enabled("cpu")] * len(input_ids)
        return SimpleNamespace(logits=self.weight * input_ids.float())


@pytest.mark.parametrize(("rows", "measured"), [(3, 3), (1000, 122)])
def test_the_ratio_is_that_of_bf16_to_fp32_on_a_part_of_a_batch_that_takes_long(monkeypatch, rows, measured):
    model = _Slow(fp32=0.00204, bf16=0.00612)
    monkeypatch.setattr(precision, "time", model)
    assert precision.bf16_ratio(model, rows, tokens=5, seconds=1.0) == (pytest.approx(3), measured)
    assert max(model.rows) == measured
    # It goes on for the seconds that it was given, three turns at least.
    assert 1.0 < model.now < 5.0
    short = _Slow(fp32=1.0, bf16=1.0)
    monkeypatch.setattr(precision, "time", short)
    assert precision.bf16_ratio(short, rows, tokens=5, seconds=0.0) == (1.0, 1)
    # Two to warm up, two to choose the rows, two to warm up with them, and three turns.
    assert len(short.rows) == 2 + 2 + 2 + 6


def test_where_a_batch_does_not_fit_fewer_rows_are_measured(monkeypatch):
    class Small(_Slow):
        def forward(self, input_ids, attention_mask):
            # In one of the two alone.
            if len(input_ids) > 5 and not torch.is_autocast_enabled("cpu"):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().forward(input_ids, attention_mask)

    model = Small(fp32=0.001, bf16=0.0005)
    monkeypatch.setattr(precision, "time", model)
    assert precision.bf16_ratio(model, 16, tokens=5, seconds=0.0) == (pytest.approx(0.5), 4)


def test_other_errors_of_a_pass_are_not_hidden():
    model = _Slow(fp32=0.0, bf16=0.0)
    model.forward = lambda **_: (_ for _ in ()).throw(RuntimeError("sizes do not match"))
    with pytest.raises(RuntimeError, match="sizes do not match"):
        precision.bf16_ratio(model, 16, tokens=5, seconds=0.0)


@pytest.mark.parametrize(("size", "expected"), [("auto", 64), (8, 8)])
def test_as_many_rows_are_measured_as_may_go_through_at_a_time(experiment, monkeypatch, size, expected):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    asked = []
    monkeypatch.setattr(settling, "prefers_bf16", lambda make, rows, *_: (asked.append(rows) or False, None))
    training = {"max_steps": 3, "per_device_train_batch_size": size, "gradient_accumulation_steps": 4}
    Pipeline(load_experiment(experiment(training=training))).settle()
    assert asked == [expected]


def test_a_real_model_is_measured_and_nothing_stays_of_it():
    model = make_student()
    state = torch.random.get_rng_state()
    ratio, rows = precision.bf16_ratio(model, rows=2, tokens=6, seconds=0)
    assert 0 < ratio < 1000
    assert rows in (1, 2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("built", "supported"), [(True, True), (True, False), (False, True)])
def test_a_cpu_has_bfloat16_where_onednn_has_kernels_for_it(monkeypatch, built, supported):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: built)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert precision.computes_bf16("cpu") is (built and supported)
    assert precision.computes_bf16("mps") is True


# ---- runs ----

STAGES = ("teacher", "baseline/seed-0", "student/seed-0")


def precisions(folder) -> list[bool]:
    records = [json.loads((folder / stage / "stage.json").read_text()) for stage in STAGES]
    return [record["fingerprint"]["training"]["bf16"] for record in records]


def test_a_run_measures_once_and_goes_on_as_it_began(experiment, tmp_path, prefers, no_doctor):
    asked, said = prefers(True), []
    path = experiment(losses={"kl": {}})
    whole = load_experiment(path)
    Pipeline(whole, said.append).run()
    assert precision.is_open(whole)
    assert precisions(tmp_path / "run") == [True] * 3
    # Results of earlier versions do not know it.
    record = json.loads((tmp_path / "run" / "student" / "seed-0" / "stage.json").read_text())
    assert "precision" not in record["fingerprint"]["training"]
    assert len(asked) == 1
    assert 2 < asked[0] <= 16
    assert "precision            bf16: it was measured" in said
    prefers(False)
    again: list[str] = []
    Pipeline(load_experiment(path), again.append).run()
    assert len(asked) == 1
    assert sum("done already" in line for line in again) == len((*STAGES, "report"))
    Pipeline(load_experiment(path)).report()
    kept = load_experiment(tmp_path / "run" / "config.json")
    assert kept.training.bf16
    assert not precision.is_open(kept)


def test_what_was_decided_is_kept_where_the_settings_have_no_such_block(experiment, tmp_path, prefers, no_doctor):
    """A minimal config: what is chosen would be chosen for a block that nobody wrote."""
    asked, path = prefers(True), experiment(losses={"kl": {}}, report={"bootstrap_samples": 100, "latency_samples": 1})
    settings = yaml.safe_load(path.read_text())
    del settings["training"], settings["teacher"]["training"]
    path.write_text(yaml.safe_dump(settings))
    Pipeline(load_experiment(path)).run(("teacher", "baseline", "student"))
    assert precisions(tmp_path / "run") == [True] * 3
    prefers(False)
    again: list[str] = []
    Pipeline(load_experiment(path), again.append).run(("teacher", "baseline", "student"))
    assert sum("done already" in line for line in again) == len(STAGES)
    assert len(asked) == 1


def test_a_run_that_began_before_there_was_a_choice_stays_in_fp32(experiment, tmp_path, prefers, no_doctor):
    asked = prefers(True)
    path = experiment(losses={"kl": {}})
    Pipeline(load_experiment(experiment(losses={"kl": {}}, training__precision="fp32"))).run(("teacher",))
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    del settings["training"]["bf16"], settings["training"]["fp16"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    said: list[str] = []
    Pipeline(load_experiment(path), said.append).run(("teacher",))
    assert any("done already" in line for line in said)
    assert not asked


def test_a_dry_run_measures_too_and_keeps_nothing(experiment, tmp_path, prefers):
    asked = prefers(True)
    pipeline = Pipeline(load_experiment(experiment(losses={"kl": {}})))
    pipeline.rehearse()
    assert len(asked) == 1
    assert pipeline.materials.mixed_precision == "bf16"
    assert not (tmp_path / "run" / "config.json").exists()
    prefers(False)
    other = Pipeline(load_experiment(experiment(losses={"kl": {}})))
    other.rehearse()
    assert other.materials.mixed_precision == "no"


def test_the_trials_of_a_sweep_train_as_its_teacher_did(experiment, tmp_path, prefers):
    asked = prefers(True)
    Pipeline(load_experiment(experiment(output_dir=str(tmp_path / "base")))).run(("teacher",), doctor=False)
    prefers(False)
    trial = Pipeline(load_experiment(experiment(output_dir=str(tmp_path / "trial"))))
    trial.settle(as_in=tmp_path / "base")
    assert mixed_precision(trial.experiment.training) == "bf16"
    assert len(asked) == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("sizes\ndo not match"), torch.OutOfMemoryError("too much"), ValueError("no")]
)
def test_a_step_that_cannot_be_measured_is_left_in_fp32(experiment, monkeypatch, error):
    """The checks that come later say what is wrong, if it is."""

    def fails(*arguments):
        raise error

    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(settling, "prefers_bf16", fails)
    said: list[str] = []
    pipeline = Pipeline(load_experiment(experiment()), said.append)
    pipeline.settle()
    assert pipeline.experiment.training.bf16 is False
    assert any("fp32: a step of the student could not be measured (" in line and "\n" not in line for line in said)


def test_the_usual_length_of_pairs_is_that_of_both_texts(experiment, monkeypatch, tmp_path, prefers):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    asked = prefers(False)
    for split, rows in (("train", 40), ("validation", 12), ("test", 12)):
        lines = [f"{i % 2},a b c {split} {i},d e f g h i" for i in range(rows)]
        (tmp_path / f"{split}.csv").write_text("label,text,other\n" + "\n".join(lines) + "\n")
    for more in ({}, {"text_pair_column": "other"}):
        data = {"dataset": str(tmp_path), "validation_split": "validation", "max_length": 32} | more
        Pipeline(load_experiment(experiment(data=data | {"label_names": ["bad", "good"]}))).settle()
    assert asked[1] >= asked[0] + 6


def test_a_report_of_nothing_decides_nothing(experiment, monkeypatch, tmp_path, prefers, no_doctor):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    asked = prefers(True)
    with pytest.raises(UsageError):
        Pipeline(load_experiment(experiment())).run(("report",))
    pipeline = Pipeline(load_experiment(experiment()))
    pipeline.settle()
    assert len(asked) == 1
    assert pipeline.experiment.training.bf16


def test_a_report_measures_nothing(experiment, prefers):
    asked = prefers(True)
    pipeline = Pipeline(load_experiment(experiment()))
    pipeline.settle(measure=False)
    assert not asked
    assert not pipeline.experiment.training.bf16
    assert not precision.is_open(pipeline.experiment)
