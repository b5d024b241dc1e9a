"""The stages of an experiment: teacher, baseline, student, report. The one place that wires the parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from distill_nlp.config import STAGES, Experiment
from distill_nlp.data import content_hash
from distill_nlp.doctor import Finding, compact_lines, examine, examine_teachers, guarded
from distill_nlp.errors import DistillError, UsageError
from distill_nlp.fingerprints import Fingerprints, plain
from distill_nlp.materials import Materials
from distill_nlp.report import REPORT_FILE, ReportTeacher, build_report, write_report
from distill_nlp.stage_runner import StageRunner
from distill_nlp.stage_training import Say, training_arguments, versions
from distill_nlp.stages import StageFolder, read_json, write_json
from distill_nlp.student_stages import StudentStages
from distill_nlp.teacher_stages import TeacherStages

CONFIG_FILE = "config.json"


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
        self.experiment = experiment
        self.root = Path(experiment.output_dir).expanduser()
        self.state = PartialState(cpu=experiment.training.use_cpu)
        self.materials = Materials(experiment)
        self.prints = Fingerprints(experiment, self.materials)
        self.runner = StageRunner(experiment, self.materials, say)
        self.teachers = TeacherStages(self.runner, self.prints)
        self.students = StudentStages(self.runner, self.prints)
        # What TrainingArguments refuse is refused before anything is loaded.
        sections = [(experiment.training, "training"), (experiment.teacher_training(), "teacher.training")]
        if experiment.phases:
            own = enumerate(experiment.student_trainings())
            sections += [(phase.training, f"phases.{i}.training") for i, phase in own]
        for section, where in sections:
            try:
                training_arguments(section, self.root, seed=0)
            except (ValueError, TypeError, ImportError) as error:
                raise UsageError(f"{where}: {' '.join(str(error).split())}") from error

    def run(self, stages: Sequence[str] = STAGES, doctor: bool = True) -> dict[str, Any] | None:
        """Runs the stages named, in their order; gives the report, if it is among them, on the main rank.

        Args:
            stages: names.
            doctor: examine the experiment first, and the teachers again when they are trained; see `examine`.

        Raises:
            UsageError: data, models and settings do not fit each other, or the doctor stops the run.
        """
        self._check_materials()
        if "baseline" in stages or "student" in stages:
            self.students.check()
        doctor = doctor and self._is_something_to_train(stages)
        if doctor:
            self._heed(partial(self._examine, stages))
        if self.state.is_main_process:
            write_json(self.root / CONFIG_FILE, self.experiment.model_dump(mode="json", exclude_unset=True))
        if "teacher" in stages and self.teachers.train() and doctor:
            self._heed(partial(examine_teachers, self.materials, self.prints))
        for seed in self.experiment.seeds:
            if "baseline" in stages:
                self.students.baseline(seed)
            if "student" in stages:
                self.students.student(seed)
        # The other ranks are not needed for the report, and a barrier would time out on a long one.
        return self._report_stage() if "report" in stages and self.state.is_main_process else None

    def rehearse(self) -> None:
        """Two steps of every stage for the first seed, to see whether they go through; nothing is kept of them.

        Raises:
            UsageError: data, models and settings do not fit each other.
            DistillError: the device has too little memory, or a loss is not finite.
        """
        self._check_materials()
        self.students.check()
        self.teachers.rehearse()
        self.students.rehearse(self.experiment.seeds[0])

    def examine(self) -> list[Finding]:
        """What the doctor finds, with all checks that pass; the same on all ranks."""
        # Loaded by all ranks together; what is wrong with them the doctor says.
        with suppress(DistillError):
            _ = self.materials.splits
        return self._examined(self._examine)

    def _examine(self, stages: Sequence[str] = STAGES) -> list[Finding]:
        """All checks as the first phase of the student meets them, and of the others that their losses fit."""
        if not self.experiment.phases:
            return examine(self.materials, self.prints, stages)
        views = self.students.views
        found = examine(views[0], self.prints, stages)
        for i, materials in enumerate(views[1:], 2):
            name, objective = f"phase {i}", partial(getattr, materials, "objective")
            found += guarded(name, lambda name=name, make=objective: Finding("ok", name, make().formula()))
        return found

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
        self.students.fill_cache()

    def _check_materials(self) -> None:
        """Loads data and tokenizers before the first stage, so that what is wrong with them shows at once."""
        splits = self.materials.splits
        parts = [f"{len(splits.train):,} train"]
        if splits.teacher_train is not splits.train:
            parts.append(f"{len(splits.teacher_train):,} for the teacher")
        if splits.unlabeled is not None:
            parts.append(f"{len(splits.unlabeled):,} unlabeled")
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

    def _report_stage(self) -> dict[str, Any]:
        seeds, materials = self.experiment.seeds, self.materials
        prints = {"baseline": self.prints.baseline, "student": self.prints.student}
        folders = {
            kind: {seed: self.runner.finished(self.root / kind / f"seed-{seed}", make(seed), kind) for seed in seeds}
            for kind, make in prints.items()
        }
        teachers = []
        for part in materials.teachers:
            path, revision = self.teachers.source(part)
            rows = materials.tokens_alone(materials.splits.test, part)
            settings = part.settings
            teachers.append(
                ReportTeacher(path, rows, part.tokenizer, revision, settings.weight, settings.restrict_labels)
            )
        # Made of just these models, these rows and these settings, a report is not made again.
        fingerprint = plain(
            {
                "test": content_hash(materials.splits.test),
                "settings": self.experiment.report.model_dump(),
                "models": {f"{kind}-{seed}": make(seed) for kind, make in prints.items() for seed in seeds},
                "device": str(self.state.device),
            }
        )
        earlier = read_json(self.root / REPORT_FILE)
        if earlier is not None and earlier.get("run", {}).get("fingerprint") == fingerprint:
            self.runner.say("report", f"done already: {self.root / 'report.md'}")
            return earlier
        start = time.monotonic()
        report = build_report(
            teachers=teachers,
            baselines=folders["baseline"],
            students=folders["student"],
            tokenizer=materials.tokenizer,
            test=materials.tokens_alone(materials.splits.test),
            label_names=materials.label_names,
            settings=self.experiment.report,
            mean=self.experiment.teacher.mean,
            device=self.state.device,
        )
        report["run"] = {
            "dataset": self.experiment.data.dataset,
            "stages": self._stage_records(),
            "versions": versions(),
            "fingerprint": fingerprint,
        }
        write_report(report, self.root)
        self.runner.say("report", f"{time.monotonic() - start:.0f} s → {self.root / 'report.md'}")
        return report

    def _stage_records(self) -> dict[str, Any]:
        """Steps, seconds and objective of each finished stage of these seeds."""
        names = [part.name for part in self.materials.teachers]
        for seed in self.experiment.seeds:
            before = [f"student/seed-{seed}-phase-{i}" for i in range(1, len(self.experiment.phases))]
            names += [f"baseline/seed-{seed}", *before, f"student/seed-{seed}"]
        records = {}
        for name in names:
            if (record := StageFolder(self.root / name).record()) is not None:
                records[name] = {key: record[key] for key in ("objective", "steps", "seconds")}
        return records
