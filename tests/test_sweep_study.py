"""The trials of a sweep on disk: who takes which, what a dead worker leaves, and what is counted."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import optuna
import pytest
from helpers import limited
from optuna.storages.journal import JournalFileSymlinkLock
from optuna.trial import TrialState

from distill_nlp.errors import UsageError
from distill_nlp.sweep.plan import Sweep, SweepPlan
from distill_nlp.sweep.space import Space
from distill_nlp.sweep.study import JOURNAL, MOST_ATTEMPTS, SweepStudy, make_pruner

DEFINITION = {"metric": "accuracy"}
SPACE = {"losses.kl.temperature": {"low": 1.0, "high": 8.0}, "student.from_teacher.layers": [1, 2, 3]}


@pytest.fixture
def open_study(tmp_path):
    """`open_study(**settings)`: a study in one folder, as each worker opens it."""

    def opened(definition=DEFINITION, **changes) -> SweepStudy:
        settings = {"experiment": "c.yaml", "output_dir": str(tmp_path / "s"), "space": SPACE, "sampler": "random"}
        sweep = Sweep.model_validate({**settings, "trials": 4, **changes})
        return SweepStudy(SweepPlan(sweep, tmp_path / "s.yaml", tmp_path / "c.yaml"), Space(sweep.space), definition)

    return opened


def run_all(study, value=0.5) -> list[dict]:
    """Finishes what there is to take; the settings of each."""
    done = []
    while (claim := study.claim()) is not None:
        done.append(claim.settings)
        claim.finish(TrialState.COMPLETE, {}, value)
    return done


def in_a_process_that_dies(act) -> None:
    """Runs `act()` in a process that is killed right after it."""
    child = os.fork()
    if child == 0:
        try:
            act()
        except BaseException:
            os._exit(1)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def test_trials_end_at_the_number_that_was_asked_for_and_go_on_from_there(open_study):
    assert len(run_all(open_study())) == 4
    assert len(run_all(open_study())) == 0
    assert len(run_all(open_study(trials=6))) == 2
    assert open_study(trials=2).claim() is None
    assert open_study().finished == 6


def test_pruned_and_failed_trials_count(open_study):
    study = open_study()
    study.claim().finish(TrialState.PRUNED, {"reason": "slow"})
    study.claim().finish(TrialState.FAIL, {"reason": "broken"})
    assert len(run_all(study)) == 2
    assert [trial.user_attrs["record"].get("reason") for trial in study.trials] == ["slow", "broken", None, None]


def test_two_workers_never_take_the_same_trial_nor_more_than_there_are(open_study):
    one, other = open_study(trials=3), open_study(trials=3)
    claims = [one.claim(), other.claim()]
    assert [claim.number for claim in claims] == [0, 1]
    assert one.running() == other.running() == 2
    claims.append(one.claim())
    assert other.claim() is None
    for claim in claims:
        claim.finish(TrialState.COMPLETE, {}, 0.5)
    assert (other.running(), other.finished) == (0, 3)


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_points_follow_the_seed_and_the_number_whoever_samples_them(open_study, tmp_path, sampler):
    whole = run_all(open_study(sampler=sampler))
    assert len({str(point) for point in whole}) == 4
    apart = []
    for _ in range(2):
        study = open_study(sampler=sampler, output_dir=str(tmp_path / "other"), trials=len(apart) + 2)
        apart += run_all(study)
    assert apart == whole
    assert run_all(open_study(sampler=sampler, output_dir=str(tmp_path / "third"), seed=1)) != whole


def test_a_worker_that_died_leaves_its_trial_to_the_next_one(open_study):
    study = open_study()
    in_a_process_that_dies(lambda: open_study().claim().trial.report(0.25, 1))
    assert (study.running(), study.finished) == (0, 0)
    left = study.trials[0]
    claim = study.claim()
    assert (claim.number, claim.taken_over) == (0, True)
    assert claim.settings == study.space.settings(left.params)
    assert study.trials[0].intermediate_values == {1: 0.25}
    claim.finish(TrialState.COMPLETE, {}, 0.5)
    assert len(run_all(study)) == 3
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 4


def test_a_worker_that_died_while_it_sampled_leaves_a_whole_trial(open_study):
    study = open_study()
    in_a_process_that_dies(lambda: study.study.ask().suggest_float("losses.kl.temperature", 1.0, 8.0))
    claim = study.claim()
    assert claim.number == 0
    assert claim.settings.keys() == SPACE.keys()


def test_a_trial_that_kills_its_workers_fails_in_the_end(open_study):
    study = open_study(trials=2)
    for _ in range(MOST_ATTEMPTS):
        in_a_process_that_dies(lambda: open_study(trials=2).claim().trial.set_user_attr("at", 0))
    claim = study.claim()
    assert claim.number == 1
    assert study.trials[0].state == TrialState.FAIL
    assert study.trials[0].user_attrs["at"] == 0
    assert study.trials[0].user_attrs["record"]["reason"] == f"{MOST_ATTEMPTS} workers died at it"
    assert study.finished == 1


def test_a_trial_that_was_given_up_is_taken_again_as_often_as_it_takes(open_study):
    for _ in range(MOST_ATTEMPTS + 1):
        claim = open_study().claim()
        assert claim.number == 0
        claim.give_up()
    assert open_study().finished == 0


def test_what_is_finished_cannot_be_given_up(open_study):
    study = open_study()
    claim = study.claim()
    claim.finish(TrialState.COMPLETE, {}, 0.5)
    claim.give_up()
    assert study.claim().number == 1


def test_who_waits_for_another_worker_is_told(open_study, monkeypatch):
    monkeypatch.setattr("distill_nlp.sweep.study._PATIENCE", 0.05)

    def waits():
        raise InterruptedError

    one, other = open_study(), open_study()
    with one.lock("base"), pytest.raises(InterruptedError), other.lock("base", waits):
        pytest.fail("two at once")
    with other.lock("base", waits):
        assert one.claim().number == 0


def test_a_grid_ends_with_its_points_each_once(open_study):
    grid = {"losses.kl.temperature": {"low": 1.0, "high": 2.0, "step": 1.0}, "student.from_teacher.layers": [1, 2, 3]}
    study = open_study(space=grid, sampler="grid", trials=4)
    assert (study.wanted, len(run_all(study))) == (4, 4)
    study = open_study(space=grid, sampler="grid", trials=20, seed=5)
    assert study.wanted == 6
    run_all(study)
    assert len({str(sorted(trial.params.items())) for trial in study.trials}) == len(study.trials) == 6


def test_a_grid_goes_on_where_a_worker_died_between_its_two_steps(open_study):
    study = open_study(space={"student.from_teacher.layers": [1, 2, 3]}, sampler="grid")
    in_a_process_that_dies(lambda: study.study.enqueue_trial(study.space.grid(0)[0]))
    assert study.trials == []
    points = run_all(study)
    assert sorted(point["student.from_teacher.layers"] for point in points) == [1, 2, 3]


def test_a_folder_with_another_sweep_is_refused(open_study):
    open_study()
    with pytest.raises(UsageError, match=r"holds a sweep with other settings \(metric: accuracy → f1\); name another"):
        open_study(definition={"metric": "f1"})


def test_half_a_line_that_a_crash_left_is_dropped(open_study, tmp_path):
    run_all(open_study(trials=2))
    journal = tmp_path / "s" / JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":4,"wor')
    study = open_study(trials=3)
    assert journal.read_bytes().startswith(whole)
    assert len(run_all(study)) == 1
    assert open_study().finished == 3


@pytest.mark.filterwarnings("ignore:The value of `grace_period`")
def test_a_worker_that_died_in_a_write_holds_up_the_next_one_for_a_while_only(open_study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distill_nlp.sweep.study._ABANDONED", 1)
    study = open_study(output_dir="relative")

    def die_in_a_write():
        os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
        study.claim()

    in_a_process_that_dies(die_in_a_write)
    assert os.path.lexists(f"relative/{JOURNAL}.lock")
    with limited(20):
        assert len(run_all(open_study(output_dir="relative"))) == 4


@pytest.mark.parametrize("folder", ["relative", "absolute"])
def test_a_lock_that_an_earlier_version_left_is_removed(open_study, tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    root = Path(folder) if folder == "relative" else tmp_path / folder
    run_all(open_study(output_dir=str(root), trials=1))
    JournalFileSymlinkLock(str(root / JOURNAL)).acquire()
    with limited(20):
        assert len(run_all(open_study(output_dir=str(root)))) == 3
    assert not os.path.lexists(root / f"{JOURNAL}.lock")


def test_each_pruner_has_its_name():
    assert isinstance(make_pruner("none"), optuna.pruners.NopPruner)
    assert isinstance(make_pruner("median"), optuna.pruners.MedianPruner)
    assert isinstance(make_pruner("hyperband"), optuna.pruners.HyperbandPruner)


def test_half_a_line_is_dropped_by_whoever_writes_next(open_study, tmp_path):
    """A disk was full while one worker wrote, and had room again when another did, which had been there before."""
    study = open_study(trials=3)
    journal = tmp_path / "s" / JOURNAL
    claim = study.claim()
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":4,"torn')
    claim.finish(TrialState.COMPLETE, {}, 0.5)
    assert journal.read_bytes().startswith(whole)
    assert b'"torn' not in journal.read_bytes()[len(whole) :]
    assert open_study(trials=3).finished == 1


def test_trials_over_other_rows_are_not_ranked_with_the_earlier_ones(open_study):
    study = open_study()
    # As long as there is none, nothing is mixed.
    study.keep_to({"data": {"train": "mended since"}, "teacher": {"model": "x"}})
    study.keep_to({"data": {"train": "a"}, "teacher": {"model": "x"}})
    study.claim().finish(TrialState.COMPLETE, {}, 0.5)
    study.keep_to({"data": {"train": "a"}, "teacher": {"model": "x"}})
    with pytest.raises(UsageError, match=r"trials over other data or under another teacher \(data.train: a → b\)"):
        open_study().keep_to({"data": {"train": "b"}, "teacher": {"model": "x"}})
