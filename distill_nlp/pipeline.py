"""The stages of an experiment: teacher, baseline, student, report. The one place that wires the parts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import set_seed

from distill_nlp.config import STAGES, Experiment
from distill_nlp.data import content_hash
from distill_nlp.errors import UsageError
from distill_nlp.fingerprints import Fingerprints, plain
from distill_nlp.losses import LOSSES, CrossEntropyLoss, DistillationLoss
from distill_nlp.materials import Materials
from distill_nlp.report import REPORT_FILE, ReportTeacher, build_report, write_report
from distill_nlp.stage_runner import StageRunner
from distill_nlp.stage_training import Say, same_budget, training_arguments, versions
from distill_nlp.stages import StageFolder, read_json, write_json
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
        # What TrainingArguments refuse is refused before anything is loaded.
        for section, where in ((experiment.training, "training"), (experiment.teacher_training(), "teacher.training")):
            try:
                training_arguments(section, self.root, seed=0)
            except (ValueError, TypeError, ImportError) as error:
                raise UsageError(f"{where}: {' '.join(str(error).split())}") from error

    def run(self, stages: Sequence[str] = STAGES) -> dict[str, Any] | None:
        """Runs the stages named, in their order; gives the report, if it is among them, on the main rank."""
        self._check_materials()
        if "baseline" in stages or "student" in stages:
            self.materials.check_student()
        if self.state.is_main_process:
            write_json(self.root / CONFIG_FILE, self.experiment.model_dump(mode="json", exclude_unset=True))
        if "teacher" in stages:
            self.teachers.train()
        for seed in self.experiment.seeds:
            if "baseline" in stages:
                self._baseline_stage(seed)
            if "student" in stages:
                self._student_stage(seed)
        # The other ranks are not needed for the report, and a barrier would time out on a long one.
        return self._report_stage() if "report" in stages and self.state.is_main_process else None

    def fill_cache(self) -> None:
        """Computes the teacher's answers for all rows that the students will learn from, ahead of their stage.

        Raises:
            UsageError: there is no finished teacher yet, or the students would not use the cache.
        """
        self._check_materials()
        self.teachers.fill_cache()

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

    # ---- baseline and student ----

    @property
    def _ce_arguments(self) -> dict[str, Any]:
        """Settings of the cross-entropy, which the baseline shares with the student; its weight means nothing there."""
        return self.experiment.losses["ce"].arguments() if "ce" in self.experiment.losses else {}

    def _arguments(self, folder: StageFolder, seed: int, with_pool: bool) -> Any:
        """The Trainer's arguments of a student. A pool sets the number of steps, also where not all of it is used."""
        section, splits = self.experiment.training, self.materials.splits
        if not with_pool:
            section = section.model_copy(update={"unlabeled_ratio": None})
        arguments = training_arguments(section, folder.checkpoints, seed)
        all_used = with_pool and self.experiment.data.unlabeled_min_confidence is None
        if splits.unlabeled is None or all_used:
            return arguments
        section = same_budget(section, arguments, len(splits.train) + len(splits.unlabeled))
        return training_arguments(section, folder.checkpoints, seed)

    def _baseline_stage(self, seed: int) -> None:
        """The student's twin: the same initial weights, as many steps, the labels alone."""
        name, folder = f"baseline, seed {seed}", StageFolder(self.root / "baseline" / f"seed-{seed}")
        fingerprint = self.prints.baseline(seed)
        if self.runner.is_done(folder, fingerprint, name):
            return
        set_seed(seed)
        model = self.materials.new_student()
        losses: dict[str, DistillationLoss] = {"ce": CrossEntropyLoss(**self._ce_arguments)}
        self.runner.job(
            name,
            folder,
            fingerprint,
            model=model,
            losses=losses,
            train=self.materials.tokens(self.materials.splits.train),
            arguments=self._arguments(folder, seed, with_pool=False),
        ).run(self.runner.tell)

    def _student_stage(self, seed: int) -> None:
        name, folder = f"student, seed {seed}", StageFolder(self.root / "student" / f"seed-{seed}")
        sections = self.experiment.losses
        fingerprint = self.prints.student(seed)
        if self.runner.is_done(folder, fingerprint, name):
            return
        # The same seed at the same point as in the baseline's stage: both start from the same weights.
        set_seed(seed)
        model = self.materials.new_student()
        self.runner.job(
            name,
            folder,
            fingerprint,
            model=model,
            losses={key: LOSSES[key](**section.arguments()) for key, section in sections.items()},
            weights={key: section.weight for key, section in sections.items()},
            teacher=self.teachers.for_students(),
            train=self.teachers.student_rows,
            arguments=self._arguments(folder, seed, with_pool=True),
        ).run(self.runner.tell)

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
        names += [f"{kind}/seed-{seed}" for seed in self.experiment.seeds for kind in ("baseline", "student")]
        records = {}
        for name in names:
            if (record := StageFolder(self.root / name).record()) is not None:
                records[name] = {key: record[key] for key in ("objective", "steps", "seconds")}
        return records
