"""The doctor through the command: alone, before a run, after the teacher's training, and switched off."""

from __future__ import annotations

import re

import pandas as pd
import pytest
from helpers import BINARY, label_config, make_teacher, make_tokenizer

from distill_nlp.cli import main
from distill_nlp.config_file import load_experiment
from distill_nlp.doctor import Finding, timing
from distill_nlp.doctor.measure import StepTime
from distill_nlp.durable_files import write_json
from distill_nlp.pipeline import Pipeline

KL = {"ce": {"weight": 0.3}, "kl": {"weight": 0.7}}


@pytest.fixture
def many_rows(tmp_path):
    """Enough rows that a sample of validation tells chance from skill; the first word is the label."""
    folder = tmp_path / "many"
    folder.mkdir()
    for split, count in (("train", 120), ("validation", 120), ("test", 120)):
        start = {"train": 0, "validation": 1000, "test": 2000}[split]
        texts = [
            f"w{4 + i % 2} w{10 + (start + i) % 83} w{10 + (start + 7 * i) % 71} w{10 + i % 50}" for i in range(count)
        ]
        pd.DataFrame({"text": texts, "label": [i % 2 for i in range(count)]}).to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.fixture
def random_teacher(tmp_path):
    """A classifier by its config, whose head was never trained."""
    make_teacher(**label_config(BINARY)).save_pretrained(tmp_path / "random")
    make_tokenizer().save_pretrained(tmp_path / "random")
    return str(tmp_path / "random")


@pytest.mark.slow
def test_the_doctor_says_all_is_well_and_leaves_no_trace(experiment, tmp_path, capsys, many_rows):
    config = experiment(data__dataset=many_rows, student__overrides={"attention_dropout": 0.0})
    assert main(["doctor", str(config)]) == 0
    out = capsys.readouterr().out
    for check in ("rows", "labels", "duplicates", "truncation", "layers", "losses", "attention", "memory", "time"):
        assert any(line.startswith(("ok", "warning")) and check in line for line in out.splitlines()), check
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_teacher_at_chance_stops_doctor_and_run_with_code_2_and_no_doctor_goes_on(
    experiment, tmp_path, capsys, many_rows, random_teacher
):
    config = str(experiment(data__dataset=many_rows, losses=KL, teacher={"model": random_teacher}))
    assert main(["doctor", config]) == 2
    assert "near chance" in " ".join(capsys.readouterr().out.split())
    assert main(["run", config]) == 2
    error = capsys.readouterr().err
    assert "doctor               stop, teacher accuracy: " in error
    assert "--no-doctor" in error.splitlines()[-1]
    assert not (tmp_path / "run").exists()
    assert main(["run", config, "--no-doctor", "--stages", "student"]) == 0
    assert "doctor" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"losses": KL}, {"losses": {}, "phases": [{"losses": {"hidden": {}}}, {"losses": KL}]}],
    ids=["one phase", "two phases"],
)
def test_a_teacher_that_learned_nothing_is_found_after_its_training(experiment, tmp_path, capsys, many_rows, changes):
    config = experiment(
        data__dataset=many_rows,
        **changes,
        teacher__training={"max_steps": 1, "learning_rate": 1.0e-6, "eval_strategy": "no", "eval_steps": None},
    )
    assert main(["run", str(config)]) == 2
    error = capsys.readouterr().err
    assert "to be fine-tuned" not in error
    assert "1 steps in" in error
    assert "near chance" in error.splitlines()[-1]
    assert (tmp_path / "run" / "teacher" / "stage.json").exists()
    assert not (tmp_path / "run" / "student").exists()


@pytest.mark.slow
def test_a_run_is_bit_identical_with_and_without_the_doctor_and_a_finished_one_is_not_examined(
    experiment, tmp_path, capsys, many_rows
):
    from safetensors.torch import load_file

    found = []
    for flags in ([], ["--no-doctor"]):
        folder = tmp_path / f"run{len(flags)}"
        training = {"max_steps": 60, "learning_rate": 0.003, "eval_steps": 30}
        config = str(experiment(data__dataset=many_rows, teacher__training=training, output_dir=str(folder)))
        settings = ["--teacher.overrides.hidden_dropout_prob", "0", "--stages", "teacher,baseline,student"]
        assert main(["run", config, *flags, *settings]) == 0
        assert ("doctor  " in capsys.readouterr().err) == (not flags)
        found.append(
            [load_file(folder / n / "model.safetensors") for n in ("teacher", "baseline/seed-0", "student/seed-0")]
        )
        assert main(["run", config, *flags, *settings]) == 0
        assert "doctor" not in capsys.readouterr().err
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys()
        assert all((one[name] == other[name]).all() for name in one)


def test_a_run_says_how_long_it_will_take_and_times_less_for_it_than_the_doctor(experiment, capsys, monkeypatch):
    given = []

    def examine(*_, seconds):
        given.append(seconds)
        return [Finding("ok", "time", "about 12 min"), Finding("stop", "losses", "it cannot be", "why", "fix")]

    monkeypatch.setattr("distill_nlp.pipeline.examine", examine)
    for command in ("doctor", "run"):
        assert main([command, str(experiment(losses=KL))]) == 2
    assert "doctor               time: about 12 min" in capsys.readouterr().err
    assert 0 < given[1] < given[0]


def test_what_it_says_of_a_phase_can_be_typed(experiment, capsys, monkeypatch):
    stop = Finding("stop", "losses", "it cannot be", "it would fail", "--losses.kl.weight 0")
    monkeypatch.setattr("distill_nlp.pipeline.examine", lambda *_, **__: [stop])
    own = {"losses": KL}
    for phases, wanted in (
        ([], "--losses.kl.weight"),
        ([{}], "--losses.kl.weight"),
        ([own, {}], "--phases.0.losses.kl.weight"),
    ):
        config = experiment(phases=phases)
        assert main(["doctor", str(config)]) == 2
        assert f"fix {wanted} 0" in " ".join(capsys.readouterr().out.split())
        typed = load_experiment(config, {wanted.removeprefix("--"): 0}).student_trainings()[0]
        # The other losses stay.
        assert typed.losses["kl"].weight == 0
        assert typed.losses["ce"].weight == 0.3


def test_data_that_cannot_be_read_are_a_stop_with_their_message(experiment, capsys):
    assert main(["doctor", str(experiment(data__dataset="/nowhere/at/all"))]) == 2
    out = " ".join(capsys.readouterr().out.split())
    assert "stop data data.dataset: no file or folder /nowhere/at/all" in out
    assert out.endswith("1 stop")


def test_losses_that_do_not_fit_are_a_stop(experiment, capsys, many_rows):
    losses = {"hidden": {"layers": [[9, 9]]}}
    assert main(["doctor", str(experiment(data__dataset=many_rows, losses=losses))]) == 2
    assert "layers" in capsys.readouterr().out


def test_help_names_the_switch(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "--no-doctor" in capsys.readouterr().out


def test_the_time_of_a_run_is_that_of_all_phases(experiment, tmp_path, monkeypatch, many_rows):
    """And of each that is left, with steps of its own."""
    phases = [{"losses": {"hidden": {}}, "training": {"max_steps": 4}}, {"losses": KL, "training": {"max_steps": 3}}]
    monkeypatch.setattr(timing, "time_step", lambda *_: StepTime(1.0, 2.0, 0.5, batches=1, rows=4))
    monkeypatch.setattr(timing, "_teacher_row", lambda *_: 0.0)

    def made():
        return Pipeline(load_experiment(experiment(losses={}, phases=phases, data__dataset=many_rows)))

    def said():
        return next(one.what for one in made().examine() if one.check == "time")

    first = said()
    assert re.search(r"baseline 7 steps, .*; student, phase 1, 4 steps, .*; student, phase 2, 3 steps, ", first)
    # The second is over the cached answers, the first over layers.
    assert first.count("teacher cache") == 1
    student, prints = tmp_path / "run" / "student", made().prints.phases(0)
    write_json(student / "seed-0-phase-1" / "stage.json", {"fingerprint": prints[0]})
    left = said()
    assert "phase 1" not in left
    assert "student, phase 2, 3 steps" in left
    (student / "seed-0-phase-1" / "stage.json").unlink()
    # What is made of it is finished: the first phase is not made again.
    write_json(student / "seed-0" / "stage.json", {"fingerprint": prints[1]})
    assert "phase" not in said()
