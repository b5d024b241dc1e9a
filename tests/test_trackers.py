"""One run of a tracker for each training, and trackers that are not there."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from test_conveniences import make_job
from transformers.integrations import integration_utils

from distill_nlp import trackers
from distill_nlp.cli import main


class Client(ModuleType):
    """What the callbacks of W&B and trackio use of their packages; `runs` has the name and the log of each."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.runs: list[tuple[str, list]] = []
        self.codes: list[int] = []
        self.config = Config()
        self.open = None
        if name == "trackio":
            # A module of the package; the run that is open stands elsewhere.
            self.run = ModuleType("trackio.run")
            current = SimpleNamespace(get=lambda: self.open)
            space = SimpleNamespace(get=lambda: None)
            self.context_vars = SimpleNamespace(current_run=current, current_space_id=space)

    def __getattr__(self, name):
        if name == "run":
            return self.open
        raise AttributeError(name)

    def init(self, name=None, resume=None, **_):
        self.open = SimpleNamespace(summary={}, _label=lambda **_: None)
        # Of trackio, a run of this name goes on.
        if not (resume and self.runs and self.runs[-1][0] == name):
            self.runs.append((name, []))

    def log(self, values):
        assert self.open is not None
        self.runs[-1][1].append(values["train/global_step"])

    def finish(self, exit_code=None):
        assert self.open is not None
        self.open = None
        self.codes.append(exit_code)


class Config(dict):
    def update(self, *_, **__):
        pass


@pytest.fixture
def client(monkeypatch):
    """`client("wandb")`: a package that is installed, with no server behind it."""

    def install(name: str) -> Client:
        made = Client(name)
        monkeypatch.setitem(sys.modules, name, made)
        errors = ModuleType("wandb.sdk.lib.config_util")
        errors.ConfigError = ValueError
        for part in ("wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"):
            monkeypatch.setitem(sys.modules, part, errors)
        monkeypatch.setattr(integration_utils, f"is_{name}_available", lambda: True)
        return made

    return install


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_each_training_has_a_run_of_its_own(client, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = client(name)
    for folder in ("one", "two"):
        make_job(Path(folder), report_to=name, max_steps=2).run(lambda line: None)
        # Also after the evaluation that follows the training.
        assert tracker.open is None
    assert set(tracker.codes) <= {0, None}
    assert [run for run, _ in tracker.runs] == ["one/student/seed-0", "two/student/seed-0"]
    assert all({1, 2} <= set(steps) for _, steps in tracker.runs)


def test_a_run_that_was_open_is_the_callers(client, tmp_path):
    tracker = client("wandb")
    tracker.init(name="mine")
    make_job(tmp_path, report_to="wandb", max_steps=1).run(lambda line: None)
    assert tracker.open is not None
    assert [run for run, _ in tracker.runs] == ["mine"]


def test_a_training_that_fails_ends_its_run(client, tmp_path, monkeypatch):
    tracker = client("wandb")
    job = make_job(tmp_path, report_to="wandb", max_steps=1)
    monkeypatch.setattr(type(job.folder), "finish", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        job.run(lambda line: None)
    assert tracker.open is None
    # As W&B takes it for a failure.
    assert tracker.codes == [1]


def test_a_tracker_that_fails_at_the_end_does_not_take_the_training_with_it(client, tmp_path, caplog):
    tracker = client("wandb")
    tracker.finish = lambda exit_code: (_ for _ in ()).throw(OSError("no server"))
    job = make_job(tmp_path, report_to="wandb", max_steps=1)
    job.run(lambda line: None)
    assert (job.folder.path / "stage.json").is_file()
    assert "WandbCallback could not end its run: no server" in caplog.text


def test_a_name_that_is_given_has_the_folder_after_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = make_job(tmp_path, max_steps=1, run_name="mine")
    job.run(lambda line: None)
    assert job.arguments.run_name == "mine: student/seed-0"
    assert trackers.run_name(None, Path("runs/teacher")) == "runs/teacher"
    monkeypatch.chdir("/")
    assert trackers.run_name(None, tmp_path / "teacher") == str(tmp_path / "teacher").lstrip("/")
    long = trackers.run_name("x" * 200, tmp_path / "student" / "seed-0")
    assert (len(long), long[-14:]) == (128, "student/seed-0")


def test_a_report_needs_no_tracker(experiment, tmp_path, no_doctor, monkeypatch, capsys):
    assert main(["run", str(experiment(training__report_to="none")), "--stages", "teacher,baseline,student"]) == 0
    monkeypatch.setattr(trackers, "get_available_reporting_integrations", lambda: [])
    # The settings that count are the same.
    words = ["run", str(experiment(training__report_to="comet_ml")), "--stages"]
    assert main([*words, "report"]) == 0
    capsys.readouterr()
    assert main([*words, "student"]) == 2
    assert "comet_ml is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("report_to", "expected"),
    [
        ("wandbb", "training: report_to: no tracker wandbb; there are "),
        ("wandbb", "did you mean wandb?"),
        ("comet_ml", "training: report_to: comet_ml is not installed; pip install comet-ml"),
        ("[tensorboard,comet_ml]", "comet_ml is not installed"),
    ],
)
def test_a_tracker_that_is_not_there_is_said_before_anything_is_loaded(
    experiment, tmp_path, capsys, monkeypatch, report_to, expected
):
    monkeypatch.setattr(trackers, "get_available_reporting_integrations", lambda: ["tensorboard"])
    assert main(["run", str(experiment()), "--training.report_to", report_to]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()
