"""The trials of a sweep on disk: Optuna's journal, shared by all workers, each trial held by at most one of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from filelock import FileLock, Timeout
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from distill_nlp.errors import UsageError
from distill_nlp.fingerprints import plain
from distill_nlp.stages import differences
from distill_nlp.sweep.plan import SweepPlan
from distill_nlp.sweep.space import Space

JOURNAL = "study.journal"
MOST_ATTEMPTS = 3
"""Workers that a trial may take with it before it counts as failed."""
RECORD = "record"
REASON = "reason"
_PATIENCE = 2.0  # seconds
_ABANDONED = 30  # seconds, of a lock around a write of milliseconds
_ATTEMPTS = "attempts"
_DEFINITION = "sweep"
_GIVEN = "given"


@dataclass
class Claim:
    """A trial that this worker runs. Its lock falls with the process, however that ends.

    Args:
        trial: Optuna's.
        settings: of the experiment, by dotted name.
        lock: held until the trial is finished or given up.
        taken_over: whether another worker began it.
    """

    trial: optuna.trial.Trial
    settings: dict[str, Any]
    lock: FileLock
    taken_over: bool = False

    @property
    def number(self) -> int:
        return self.trial.number

    def finish(self, state: TrialState, record: dict[str, Any], value: float | None = None) -> None:
        """Writes the result down, and lets go."""
        self.trial.set_user_attr(RECORD, plain(record))
        self.trial.study.tell(self.trial, value, state)
        self.lock.release()

    def give_up(self) -> None:
        """Leaves the trial to the next worker, at no fault of its own; one that is finished stays so."""
        frozen = self.trial.study.get_trials(deepcopy=False)[self.number]
        if not frozen.state.is_finished():
            self.trial.set_user_attr(_ATTEMPTS, frozen.user_attrs[_ATTEMPTS] - 1)
        self.lock.release()


class SweepStudy:
    """The study of a sweep, made on the first opening.

    Args:
        plan: of the sweep.
        space: its points.
        definition: what makes trials comparable, as nested plain values.

    Raises:
        UsageError: the folder holds a sweep of another definition.
    """

    def __init__(self, plan: SweepPlan, space: Space, definition: dict[str, Any]) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.plan = plan
        self.space = space
        self.metric = definition["metric"]
        self.root = plan.root
        (self.root / "locks").mkdir(parents=True, exist_ok=True)
        with self.lock():
            path = self.root / JOURNAL
            lock = _JournalLock(path)
            lock.drop_torn_line()
            self.study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(path), lock_obj=lock)),
                study_name="sweep",
                direction="maximize",
                pruner=make_pruner(plan.sweep.pruner),
                load_if_exists=True,
            )
            known = self.study.user_attrs.get(_DEFINITION)
            if known is None:
                self.study.set_user_attr(_DEFINITION, plain(definition))
            elif changes := differences(known, plain(definition)):
                raise UsageError(
                    f"{self.root} holds a sweep with other settings ({'; '.join(changes[:3])}); name another "
                    "output_dir, or go back to its settings"
                )

    def keep_to(self, given: dict[str, Any]) -> None:
        """Trials over other rows, or under another teacher, are not ranked together.

        Args:
            given: what all students learn from, as nested plain values.

        Raises:
            UsageError: the trials that are there were over something else.
        """
        with self.lock():
            known = self.study.user_attrs.get(_GIVEN)
            if known is None or not self.trials:
                self.study.set_user_attr(_GIVEN, given)
                known = given
        if changes := differences(known, given):
            raise UsageError(
                f"{self.root} holds trials over other data or under another teacher ({'; '.join(changes[:3])}); name "
                "another output_dir, or bring these back"
            )

    @contextmanager
    def lock(self, name: str = "study", waits: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Only one worker at a time; `waits` is called where another one is in it for long."""
        lock = FileLock(self.root / "locks" / f"{name}.lock")
        try:
            lock.acquire(timeout=_PATIENCE)
        except Timeout:
            waits()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @property
    def trials(self) -> list[FrozenTrial]:
        """All that was begun, by number."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]

    @cached_property
    def _grid(self) -> list[dict[str, Any]] | None:
        return self.space.grid(self.plan.sweep.seed) if self.plan.sweep.sampler == "grid" else None

    @property
    def wanted(self) -> int:
        """Finished trials to end with; a grid has no more than its points."""
        trials = self.plan.sweep.trials
        return trials if self._grid is None else min(trials, len(self._grid))

    @property
    def finished(self) -> int:
        return sum(trial.state.is_finished() for trial in self.trials)

    def claim(self) -> Claim | None:
        """The next trial for this worker: one that a dead worker left, else a new one; None where all are taken."""
        with self.lock():
            for trial in self.trials:
                if trial.state == TrialState.RUNNING and (claim := self._take_over(trial)) is not None:
                    return claim
            if len(self.trials) >= self.wanted:
                return None
            return self._new()

    def _new(self) -> Claim:
        number = len(self.study.get_trials(deepcopy=False))
        # By the number of the trial: workers that start alike, or start again, must not try the same points.
        seed = int(np.random.SeedSequence([self.plan.sweep.seed, number]).generate_state(1)[0])
        self.study.sampler = make_sampler(self.plan.sweep.sampler, seed)
        if self._grid is not None and not self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            done = [trial.params for trial in self.trials]
            self.study.enqueue_trial(next(point for point in self._grid if point not in done))
        trial = self.study.ask()
        self.space.sample(trial)
        trial.set_user_attr(_ATTEMPTS, 1)
        lock = self._trial_lock(trial.number)
        lock.acquire()
        return Claim(trial, self.space.settings(trial.params), lock)

    def _take_over(self, frozen: FrozenTrial) -> Claim | None:
        lock = self._trial_lock(frozen.number)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        trial = optuna.trial.Trial(self.study, frozen._trial_id)
        attempts = frozen.user_attrs.get(_ATTEMPTS, 0) + 1
        if attempts > MOST_ATTEMPTS:
            reason = f"{MOST_ATTEMPTS} workers died at it"
            Claim(trial, {}, lock).finish(TrialState.FAIL, {REASON: reason})
            return None
        trial.set_user_attr(_ATTEMPTS, attempts)
        self.space.sample(trial)  # what the worker that died has left out
        return Claim(trial, self.space.settings(trial.params), lock, taken_over=True)

    def running(self) -> int:
        """Trials that some worker is at, now."""
        with self.lock():
            return sum(self._is_held(trial.number) for trial in self.trials if trial.state == TrialState.RUNNING)

    def _is_held(self, number: int) -> bool:
        lock = self._trial_lock(number)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        return False

    def _trial_lock(self, number: int) -> FileLock:
        return FileLock(self.root / "locks" / f"trial-{number:04d}.lock")


def make_pruner(name: str) -> optuna.pruners.BasePruner:
    """Steps are evaluations, so that trials of other lengths compare."""
    makers = {
        "none": optuna.pruners.NopPruner,
        "median": optuna.pruners.MedianPruner,
        "hyperband": optuna.pruners.HyperbandPruner,
    }
    return makers[name]()


def make_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """A grid's points are enqueued; its sampler is never asked."""
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)


class _JournalLock(JournalFileOpenLock):
    """The lock of one write. A worker that is killed in it leaves it, and the next one takes it away after a while.

    It is a file and not Optuna's link: a link to a relative path leads nowhere, and Optuna, which asks for the age of
    what it leads to, waits for that without an end. So one that an earlier version left is removed here.
    """

    def __init__(self, path: Path) -> None:
        left = path.with_name(f"{path.name}.lock")
        if left.is_symlink():
            left.unlink(missing_ok=True)
        super().__init__(str(path), grace_period=_ABANDONED)
        self._journal = path

    def acquire(self) -> bool:
        """As Optuna's, and what a write left that was cut short, by a full disk or a kill, is gone.

        With the next line behind it, nothing could be read any more.
        """
        acquired = super().acquire()
        try:
            with open(self._journal, "rb+") as journal:
                if journal.seek(0, os.SEEK_END) and (journal.seek(-1, os.SEEK_END), journal.read(1))[1] != b"\n":
                    journal.seek(0)
                    journal.truncate(journal.read().rfind(b"\n") + 1)
        except FileNotFoundError:
            pass
        except BaseException:
            self.release()
            raise
        return acquired

    def drop_torn_line(self) -> None:
        """Before the first reading."""
        self.acquire()
        self.release()
