"""The stages of an experiment: teacher, baseline, student, report. The one place that wires the parts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from distill_nlp.arguments import refuse_data_parallel
from distill_nlp.config import CONFIG_FILE, STAGES, SYNTHETIC, TRAIN_TOKENIZER, Experiment
from distill_nlp.config_training import TrainingSection
from distill_nlp.doctor import TIMING_SECONDS, Finding, compact_lines, examine, examine_teachers, guarded
from distill_nlp.durable_files import write_json
from distill_nlp.errors import DistillError, UsageError
from distill_nlp.fingerprints import Fingerprints
from distill_nlp.loading import trust_remote_code
from distill_nlp.materials import Materials
from distill_nlp.output_folder import check_can_be_made, check_no_way_out
from distill_nlp.report_stage import ReportStage
from distill_nlp.settling import OpenSettings
from distill_nlp.stage_runner import StageRunner
from distill_nlp.stage_training import Say
from distill_nlp.stages import StageFolder
from distill_nlp.student_stages import StudentStages
from distill_nlp.teacher_stages import TeacherStages
from distill_nlp.trackers import check_trackers
from distill_nlp.training_settings import training_arguments

_SECONDS_OF_PATIENCE = 2 * 60 * 60
_TIMING_SECONDS_OF_A_RUN = TIMING_SECONDS / 3
"""Whoever asks the doctor wants the estimate, whoever runs wants the run."""


def _patience(training: TrainingSection) -> timedelta:
    """How long ranks wait for one another: by PyTorch's own measure NCCL gives up while one of them tokenizes."""
    return timedelta(seconds=(training.model_extra or {}).get("ddp_timeout", _SECONDS_OF_PATIENCE))


class Pipeline:
    """Runs an experiment stage by stage; a stage that is finished with the same settings is not done again.

    Every rank of a distributed launch runs the same code; the main one writes.

    Args:
        experiment: validated settings.
        say: gets one line for the user at each event; called on the main rank only.

    Raises:
        UsageError: data, models and settings do not fit each other.
    """

    def __init__(self, experiment: Experiment, say: Say = lambda line: None) -> None:
        # A copy: the precision is decided here, and the caller's settings stay open.
        self.experiment = experiment = experiment.model_copy(deep=True)
        self.root = Path(experiment.output_dir).expanduser()
        for setting, folder in (("output_dir", self.root), ("cache_dir", experiment.cache_dir)):
            if folder is not None:
                check_can_be_made(Path(folder).expanduser(), setting)
        check_no_way_out(self.root)
        self.state = PartialState(cpu=experiment.training.use_cpu, timeout=_patience(experiment.training))
        self.materials = Materials(experiment)
        self.prints = Fingerprints(experiment, self.materials)
        self.runner = StageRunner(experiment, self.materials, say)
        trust_remote_code(experiment.trust_remote_code, partial(self.runner.say, "models"))
        self.teachers = TeacherStages(self.runner, self.prints)
        self.students = StudentStages(self.runner, self.prints)
        # What TrainingArguments refuse is refused before anything is loaded.
        self._check_trainings(lambda section: training_arguments(section, self.root, seed=0))

    def _check_trainings(self, check: Callable[[TrainingSection], Any]) -> None:
        """Has the settings of each training checked; what is wrong is said with their path."""
        experiment = self.experiment
        sections = [(experiment.training, "training"), (experiment.teacher_training(), "teacher.training")]
        if experiment.phases:
            own = enumerate(experiment.student_trainings())
            sections += [(phase.training, f"phases.{i}.training") for i, phase in own]
        for section, where in sections:
            try:
                check(section)
            except (ValueError, TypeError, ImportError) as error:
                raise UsageError(f"{where}: {' '.join(str(error).split())}") from error

    def _check_can_train(self) -> None:
        """A report can be made, and a cache filled, where there is no tracker, and on one of several GPUs."""
        self._check_trainings(lambda section: check_trackers(section.report_to))
        self._check_trainings(lambda section: refuse_data_parallel(training_arguments(section, self.root, seed=0)))

    def run(self, stages: Sequence[str] = STAGES, doctor: bool = True) -> dict[str, Any] | None:
        """Runs the stages named, in their order; gives the report, if it is among them, on the main rank.

        Args:
            stages: names.
            doctor: examine the experiment first, and the teachers again when they are trained; see `examine`.

        Raises:
            UsageError: data, models and settings do not fit each other, or the doctor stops the run.
        """
        trains = bool({"teacher", "baseline", "student"} & set(stages))
        if trains:
            self._check_can_train()
        self._check_materials()
        self.settle(measure=trains)
        if "baseline" in stages or "student" in stages:
            self.students.check()
        doctor = doctor and self._is_something_to_train(stages)
        if doctor:
            # By all ranks, which tokenize in turn; the doctor is the main one's alone.
            _ = self.students.views
            self._heed(partial(self._examine, stages, _TIMING_SECONDS_OF_A_RUN))
        # Each student keeps them too: another run may begin in this folder before the student is pushed.
        self.runner.run_settings = _settings(self.experiment)
        # A report of nothing must not decide the precision of a run that has not begun.
        if self.state.is_main_process and (set(stages) != {"report"} or (self.root / CONFIG_FILE).is_file()):
            write_json(self.root / CONFIG_FILE, self.runner.run_settings)
        if "teacher" in stages and self.teachers.train() and doctor:
            # All ranks make the views together.
            self._heed(partial(self._examine_teachers, self.students.view_of_answers))
        for seed in self.experiment.seeds:
            if "baseline" in stages:
                self.students.baseline(seed)
            if "student" in stages:
                self.students.student(seed)
        # The other ranks are not needed for the report, and a barrier would time out on a long one.
        if "report" not in stages or not self.state.is_main_process:
            return None
        return ReportStage(self.runner, self.prints, self.teachers).make()

    def rehearse(self, stages: Sequence[str] = STAGES) -> None:
        """Two steps of the stages named for the first seed, to see whether they go through; nothing is kept of them.

        Args:
            stages: names; a report is not tried.

        Raises:
            UsageError: data, models and settings do not fit each other.
            DistillError: the device has too little memory, or a loss is not finite.
        """
        self._check_can_train()
        self._check_materials()
        self.settle()
        self.students.check()
        if "teacher" in stages:
            self.teachers.rehearse()
        self.students.rehearse(self.experiment.seeds[0], stages)

    def examine(self) -> list[Finding]:
        """What the doctor finds, with all checks that pass; the same on all ranks."""
        # Loaded by all ranks together; what is wrong with them the doctor says.
        with suppress(DistillError):
            _ = self.materials.splits
            self.settle()
            _ = self.students.views
        return self._examined(self._examine)

    def _examine(self, stages: Sequence[str] = STAGES, seconds: float = TIMING_SECONDS) -> list[Finding]:
        """All checks as the first phase of the student meets them, and of the others that their losses fit."""
        if not self.experiment.phases:
            return examine(self.materials, self.prints, stages, seconds=seconds)
        views = self.students.views
        found = self._for_phase(0, examine(views[0], self.prints, stages, seconds=seconds))
        for i, materials in enumerate(views[1:], 2):
            name, objective = f"phase {i}", partial(getattr, materials, "objective")
            found += guarded(name, lambda name=name, make=objective: Finding("ok", name, make().formula()))
        return found

    def _examine_teachers(self, view: Materials) -> list[Finding]:
        """The answers of teachers that are trained now, as the phase that has this view reads them."""
        index = next(i for i, other in enumerate(self.students.views) if other is view)
        return self._for_phase(index, examine_teachers(view, self.prints))

    def _for_phase(self, index: int, found: list[Finding]) -> list[Finding]:
        """What is to be typed names the phase, where that has losses of its own; else it has the experiment's."""
        if not self.experiment.phases or self.experiment.phases[index].losses is None:
            return found
        return [replace(one, fix=one.fix.replace("--losses.", f"--phases.{index}.losses.")) for one in found]

    def _examined(self, checks: Callable[[], list[Finding]]) -> list[Finding]:
        # The main rank alone: the others would only do the same work beside it.
        found = checks() if self.state.is_main_process else None
        return broadcast_object_list([found])[0]

    def _heed(self, checks: Callable[[], list[Finding]]) -> None:
        """Says what the doctor warns of, and ends the run at a stop."""
        found = self._examined(checks)
        if self.state.is_main_process:
            for line in compact_lines(found):
                self.runner.tell(line)
        if stops := [finding for finding in found if finding.level == "stop"]:
            raise UsageError(
                f"the doctor stops the run: {'; '.join(finding.what for finding in stops)} (--no-doctor runs it all "
                "the same)"
            )

    def _is_something_to_train(self, stages: Sequence[str]) -> bool:
        """Whether a stage is not finished with these settings yet; the same on all ranks."""
        wanted = []
        if "teacher" in stages:
            parts = [part for part in self.materials.teachers if part.finished is None]
            wanted += [(part.name, self.prints.teachers[part.index]) for part in parts]
        for kind, make in (("baseline", self.prints.baseline), ("student", self.prints.student)):
            if kind in stages:
                wanted += [(f"{kind}/seed-{seed}", make(seed)) for seed in self.experiment.seeds]
        changes = [StageFolder(self.root / name).changes(fingerprint) for name, fingerprint in wanted]
        return broadcast_object_list([any(change != [] for change in changes)])[0]

    def fill_cache(self) -> None:
        """Computes the teacher's answers for all rows that the students will learn from, ahead of their stage.

        Raises:
            UsageError: there is no finished teacher yet, or the students would not use the cache.
        """
        self._check_materials()
        self.settle()
        self.students.fill_cache()

    def settle(self, measure: bool = True, as_in: Path | None = None) -> None:
        """Decides what the settings leave open, precision and batch sizes: as the run began, else by measuring.

        Args:
            measure: False: fp32 and the usual batch size, where no run began.
            as_in: folder of the run that decides; its own where not given.
        """
        OpenSettings(self.experiment, self.materials, self.runner.say).settle(as_in or self.root, measure)

    def _check_materials(self) -> None:
        """Loads data and tokenizers before the first stage, so that what is wrong with them shows at once."""
        splits = self.materials.splits
        counted = "{:,}" if splits.streams is None else "the first {:,} of"
        parts = [f"{counted.format(len(splits.train))} train"]
        if splits.teacher_train is not splits.train:
            parts.append(f"{counted.format(len(splits.teacher_train))} for the teacher")
        if splits.unlabeled is not None:
            parts.append(f"{counted.format(len(splits.unlabeled))} unlabeled")
        parts += [f"{len(splits.validation):,} validation", f"{len(splits.test):,} test"]
        labels = ", ".join(self.materials.label_names)
        self.runner.say("data", f"{self.experiment.data.dataset}: {', '.join(parts)}; labels {labels}")
        for note in splits.notes:
            self.runner.say("data", note)
        self.materials.check_tokenizers()
        for part in self.materials.teachers:
            if part.prefix:
                self.runner.say(part.name, f"reads tokens of its own, up to {part.max_length}")

    # ---- the report ----

    def report(self, fresh: bool = False) -> dict[str, Any]:
        """Makes the report of the finished models again, without training; for one process.

        Args:
            fresh: predict and measure again, whatever an earlier report found of the same models and rows.

        Raises:
            UsageError: a stage is not finished, or was made with other settings.
        """
        self.settle(measure=False)
        self.prints.trust_launch_of(self.root / "student" / f"seed-{self.experiment.seeds[0]}")
        return ReportStage(self.runner, self.prints, self.teachers).make(again=True, fresh=fresh)


def _settings(experiment: Experiment) -> dict[str, Any]:
    """As they are kept with the run: what is on this machine by its absolute path, as from here it is known to be.

    From another folder `data/imdb` could as well be something on the Hub, and a report would not find it.
    """
    kept = experiment.model_dump(mode="json", exclude_unset=True)
    if experiment.data.streaming:
        # What it adds is made of the rest each time.
        kept["training"] = experiment.given_training.model_dump(mode="json", exclude_unset=True)
    data, teacher, student = kept["data"], kept["teacher"], kept["student"]
    for section, name in ((kept, "output_dir"), (kept, "cache_dir")):
        if section.get(name) is not None:
            section[name] = os.path.abspath(Path(section[name]).expanduser())
    places = [(data, "dataset"), (data, "tokenizer"), (student, "model"), (teacher, "model")]
    places += [(data, "unlabeled")] * Path(experiment.data.unlabeled or "").expanduser().is_file()
    places += [(member, "model") for member in teacher.get("ensemble", [])]
    for section, name in places:
        value = section.get(name)
        if value is not None and value not in (SYNTHETIC, TRAIN_TOKENIZER) and Path(value).expanduser().exists():
            section[name] = os.path.abspath(Path(value).expanduser())
    return kept
