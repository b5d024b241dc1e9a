"""The batch size "auto": what fits of a step's rows, chosen once; and what follows where nothing fits."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from distill_nlp import settling
from distill_nlp.config_file import load_experiment
from distill_nlp.doctor import Subject, fitting, fitting_batch_size
from distill_nlp.errors import UsageError
from distill_nlp.fingerprints import Fingerprints
from distill_nlp.losses import LOSSES
from distill_nlp.losses.base import ModelShape
from distill_nlp.materials import Materials
from distill_nlp.outputs import AttentionInputs, Features
from distill_nlp.pipeline import Pipeline

AUTO = {"max_steps": 3, "eval_strategy": "no", "per_device_train_batch_size": "auto", "gradient_accumulation_steps": 2}


def sizes(section) -> tuple[int, int, bool]:
    return section.per_device_train_batch_size, section.gradient_accumulation_steps, section.auto_batch_size


# ---- settings ----


def test_auto_is_said_in_the_place_of_a_number_and_reaches_the_teacher(experiment):
    made = load_experiment(experiment(training=AUTO))
    assert sizes(made.training) == sizes(made.teacher_training()) == (16, 2, True)
    own = load_experiment(experiment(training=AUTO, teacher__training={"per_device_train_batch_size": 4}))
    assert sizes(own.teacher_training()) == (4, 2, False)
    other = load_experiment(experiment(teacher__training={"per_device_train_batch_size": "auto"}))
    assert not other.training.auto_batch_size
    assert other.teacher_training().auto_batch_size


def test_a_phase_may_have_a_size_of_its_own_but_not_auto(experiment):
    phases = [{"training": {"per_device_train_batch_size": 2}}, {}]
    made = load_experiment(experiment(training=AUTO, phases=phases))
    assert [sizes(phase.training) for phase in made.student_trainings()] == [(2, 2, False), (16, 2, True)]
    with pytest.raises(UsageError, match="phases.1.training.per_device_train_batch_size: auto is for all phases"):
        load_experiment(experiment(phases=[{}, {"training": {"per_device_train_batch_size": "auto"}}]))


@pytest.mark.parametrize("value", ["automatic", 0, 1.5, None, True])
def test_anything_else_is_refused(experiment, value):
    with pytest.raises(UsageError, match="training.per_device_train_batch_size"):
        load_experiment(experiment(training__per_device_train_batch_size=value))


PER_ROW = {"schedule": "flsw", "value": 4, "beta": 0.5}
COMPARING = {
    "rkd_distance": {},
    "rkd_angle": {},
    "similarity": {},
    "dist": {"inter_weight": 0.0},
    "kl": {"temperature": PER_ROW},
    "reverse_kl": {"temperature": PER_ROW | {"schedule": "cwsm"}},
    "dkd": {"temperature": PER_ROW},
}


@pytest.mark.parametrize("name", COMPARING)
def test_it_is_refused_where_a_loss_compares_the_rows_of_a_forward_pass(experiment, name):
    losses = {"ce": {}, name: COMPARING[name]}
    with pytest.raises(UsageError, match=f"per_device_train_batch_size: auto decides.*losses.{name} compares.*number"):
        load_experiment(experiment(losses=losses, training=AUTO))
    with pytest.raises(UsageError, match=f"losses.{name} compares"):
        load_experiment(experiment(phases=[{}, {"losses": losses}], training=AUTO))
    for fits in (AUTO | {"per_device_train_batch_size": 8}, {"max_steps": 3}):
        load_experiment(experiment(losses=losses, training=fits))
    load_experiment(experiment(losses={"ce": {}, name: COMPARING[name] | {"weight": 0}}, training=AUTO))
    own = {"losses": losses, "training": {"per_device_train_batch_size": 8}}
    load_experiment(experiment(losses={"ce": {}}, phases=[{}, own], training=AUTO))
    load_experiment(experiment(losses=losses, teacher__training={"per_device_train_batch_size": "auto"}))


def test_a_loss_compares_rows_if_it_changes_where_a_batch_is_cut():
    """Of all losses there are, in their usual settings and those of `COMPARING`."""
    made = [(name, COMPARING.get(name, {})) for name in LOSSES] + [("kl", {}), ("reverse_kl", {}), ("dkd", {})]
    shape = ModelShape(num_labels=4, num_layers=2, hidden_size=8, num_attention_heads=2)
    generator = torch.Generator().manual_seed(0)

    def features() -> Features:
        def random(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        states = {layer: random(6, 5, 8) for layer in range(3)}
        heads = {layer: AttentionInputs(*(random(6, 2, 5, 4) for _ in range(3)), None, 0.5) for layer in range(1, 3)}
        return Features(random(6, 4), states, heads)

    student, teacher = features(), features()
    labels, mask = torch.arange(6) % 4, torch.ones(6, 5, dtype=torch.long)

    def part(of: Features, rows: slice) -> Features:
        heads = {
            layer: AttentionInputs(a.query[rows], a.key[rows], a.value[rows], None, a.scaling)
            for layer, a in of.attentions.items()
        }
        return Features(of.logits[rows], {n: s[rows] for n, s in of.hidden_states.items()}, heads)

    for name, settings in made:
        loss = LOSSES[name](**settings)
        loss.bind(shape, shape)
        whole = loss(student, teacher, labels, mask)
        halves = [
            loss(part(student, rows), part(teacher, rows), labels[rows], mask[rows])
            for rows in (slice(0, 3), slice(3, 6))
        ]
        differs = not torch.allclose(whole, torch.stack(halves).mean(), rtol=1e-9, atol=1e-12)
        assert loss.compares_rows == differs, name


def test_it_is_refused_where_unlabeled_rows_have_a_share_of_each_batch(experiment):
    training = AUTO | {"unlabeled_ratio": 0.5}
    with pytest.raises(UsageError, match="per_device_train_batch_size: auto decides.*unlabeled_ratio mixes"):
        load_experiment(experiment(data__unlabeled="pool", training=training))


# ---- what fits ----


@pytest.fixture
def subject(experiment):
    """Of the tiny experiment with live teacher, and of its memory for so many rows."""
    made = load_experiment(experiment())
    materials = Materials(made)
    return Subject(materials, Fingerprints(made, materials))


def needed(subject, rows, part=None) -> int:
    found = fitting._student_memory(subject, rows) if part is None else fitting._teacher_memory(subject, part, rows)
    return found.total


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize(("fits", "size"), [(24, 24), (11, 8), (5, 4), (3, 3)])
def test_the_largest_divisor_that_fits_is_taken(subject, fits, size, who):
    part = None if who == "student" else subject.materials.lead
    between = (needed(subject, fits, part) + needed(subject, fits + 1, part)) / 2
    found, line = fitting_batch_size(subject, 24, (between / 0.7, "system"), part)
    assert found == size
    assert line.startswith(f"{size} of 24 rows of a step at a time: about ")
    assert line.endswith("free (system)")


def test_where_not_even_one_row_fits_one_is_tried_and_where_nothing_is_known_all(subject):
    assert fitting_batch_size(subject, 16, (10, "system"))[0] == 1
    assert fitting_batch_size(subject, 16, (None, "mps")) == (16, "16 rows at a time: the free memory is not known")


def test_the_estimate_is_a_line_in_the_rows_and_leaves_no_trace(subject):
    found = [needed(subject, rows) for rows in (1, 9, 17)]
    assert found[2] - found[1] == pytest.approx(found[1] - found[0], rel=0.01)
    state = torch.random.get_rng_state()
    fitting_batch_size(subject, 16, (10**9, "system"))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_loss_whose_weight_rises_from_nothing_counts(experiment):
    def of(weight):
        made = load_experiment(experiment(losses={"kl": {}, "attention": {"weight": weight, "layers": "uniform"}}))
        return needed(Subject(Materials(made), Fingerprints(made, Materials(made))), 16)

    assert of({"schedule": "linear", "start": 0.0, "end": 1.0}) == of(1.0)


def test_the_teachers_rows_are_as_long_as_its_longest(experiment, tmp_path):
    """A few long ones among many."""

    def of(longest):
        for split, rows in (("train", 1000), ("validation", 12), ("test", 12)):
            texts = ["a b" if i % 200 else " ".join("abcdefghij"[:longest]) for i in range(rows)]
            lines = [f"{i % 2},{text} {split} {i}" for i, text in enumerate(texts)]
            (tmp_path / f"{split}.csv").write_text("label,text\n" + "\n".join(lines) + "\n")
        made = load_experiment(experiment(data__dataset=str(tmp_path), data__label_names=["bad", "good"]))
        materials = Materials(made)
        part = materials.lead
        return needed(Subject(materials, Fingerprints(made, materials)), 16, part)

    assert of(10) > of(2)


def test_ranks_share_the_memory_of_a_machine(subject, monkeypatch):
    free = (needed(subject, 16) + needed(subject, 17)) / 2 / 0.7, "system"
    assert fitting_batch_size(subject, 16, free)[0] == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert fitting_batch_size(subject, 16, free)[0] < 16
    # Each rank has a GPU of its own.
    assert fitting._copies(SimpleNamespace(device=torch.device("cuda"))) == 1


@pytest.mark.parametrize(
    ("of_ranks", "least"),
    [([(900, "GPU"), (100, "GPU")], (100, "GPU")), ([(900, "mps"), (None, "mps")], (None, "mps"))],
)
def test_the_device_that_has_least_free_memory_decides(experiment, monkeypatch, of_ranks, least):
    asked = []
    monkeypatch.setattr(settling, "gather_object", lambda own: of_ranks)

    def found(subject, rows, free, part=None):
        asked.append(free)
        return 4, "a line"

    monkeypatch.setattr(settling, "fitting_batch_size", found)
    Pipeline(load_experiment(experiment(training=AUTO, losses={"kl": {}}))).settle()
    assert asked == [least, least]


# ---- runs ----


@pytest.fixture
def fits(monkeypatch):
    """`fits(student=4, teacher=8)`: what will be found to fit; a list of who was asked for."""
    asked: list[tuple[str, int]] = []

    def set_to(**sizes) -> list[tuple[str, int]]:
        def found(subject, rows, free, part=None):
            who = "student" if part is None else "teacher"
            asked.append((who, rows))
            return sizes[who], f"{sizes[who]} of {rows} rows"

        monkeypatch.setattr(settling, "fitting_batch_size", found)
        return asked

    return set_to


def test_a_step_keeps_its_rows_and_a_run_its_choice(experiment, tmp_path, fits, no_doctor):
    path = experiment(training=AUTO, losses={"kl": {}})
    asked, said = fits(student=4, teacher=8), []
    Pipeline(load_experiment(path), said.append).run(("teacher", "baseline", "student"))
    assert asked == [("teacher", 32), ("student", 32)]
    assert "batch size           teacher: 8 of 32 rows" in said
    assert "batch size           student: 4 of 32 rows" in said
    records = {
        name: json.loads((tmp_path / "run" / name / "stage.json").read_text())
        for name in ("teacher", "baseline/seed-0", "student/seed-0")
    }
    trainings = {name: record["fingerprint"]["training"] for name, record in records.items()}
    found = {n: (t["per_device_train_batch_size"], t["gradient_accumulation_steps"]) for n, t in trainings.items()}
    assert found == {"teacher": (8, 4), "baseline/seed-0": (4, 8), "student/seed-0": (4, 8)}
    assert "auto_batch_size" not in trainings["student/seed-0"]
    fits(student=1, teacher=1)
    again: list[str] = []
    Pipeline(load_experiment(path), again.append).run(("teacher", "baseline", "student"))
    assert len(asked) == 2
    assert sum("done already" in line for line in again) == 3
    assert [line.split(None, 2)[2] for line in again if line.startswith("batch size")] == [
        f"{who} rows at a time, as this run began" for who in ("teacher: 8", "student: 4")
    ]


def test_another_number_of_rows_in_a_step_is_chosen_anew(experiment, fits, no_doctor):
    asked = fits(student=4, teacher=8)
    Pipeline(load_experiment(experiment(training=AUTO, losses={"kl": {}}))).run(("teacher",))
    changed = AUTO | {"gradient_accumulation_steps": 1}
    Pipeline(load_experiment(experiment(training=changed, losses={"kl": {}}))).run(("teacher",))
    assert asked == [("teacher", 32), ("student", 32), ("teacher", 16), ("student", 16)]


def test_a_run_that_began_with_the_usual_size_keeps_it(experiment, fits, no_doctor):
    asked, usual = fits(student=4, teacher=8), {"max_steps": 3, "eval_strategy": "no"}
    Pipeline(load_experiment(experiment(training=usual, losses={"kl": {}}))).run(("teacher",))
    said: list[str] = []
    auto = usual | {"per_device_train_batch_size": "auto"}
    Pipeline(load_experiment(experiment(training=auto, losses={"kl": {}})), said.append).run(("teacher",))
    assert any("done already" in line for line in said)
    assert asked == []


def test_all_phases_fit(experiment, monkeypatch, tmp_path):
    """The smallest of what their losses leave room for; who has an own size or own steps keeps the rows of a step."""
    own = {"per_device_train_batch_size": 2}
    phases = [{"losses": {"kl": {}}, "training": own}, {"losses": {"ce": {}}}]
    phases.append({"losses": {"ce": {}}, "training": {"gradient_accumulation_steps": 3}})
    pipeline = Pipeline(load_experiment(experiment(training=AUTO, phases=phases, teacher__training=own)))
    fit = {"kl": 4, "ce": 8}
    monkeypatch.setattr(
        settling,
        "fitting_batch_size",
        lambda subject, rows, free, part=None: (16 if part else fit[next(iter(subject.experiment.losses))], "a line"),
    )
    pipeline.settle()
    assert sizes(pipeline.experiment.training) == (4, 8, False)
    assert [sizes(e.training)[:2] for e in pipeline.experiment.student_trainings()] == [(2, 2), (4, 8), (4, 12)]
    assert sizes(pipeline.experiment.teacher_training()) == (2, 2, False)


def test_a_finished_teacher_is_not_measured(experiment, tmp_path, fits, no_doctor):
    path = experiment(losses={"kl": {}})
    Pipeline(load_experiment(path)).run(("teacher",))
    asked = fits(student=4)
    settings = {"training": AUTO, "losses": {"kl": {}}, "output_dir": str(tmp_path / "other")}
    pipeline = Pipeline(load_experiment(experiment(teacher={"model": str(tmp_path / "run" / "teacher")}, **settings)))
    pipeline.settle()
    assert asked == [("student", 32)]
    assert sizes(pipeline.experiment.teacher_training()) == (16, 2, False)
