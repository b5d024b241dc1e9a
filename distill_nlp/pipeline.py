"""The stages of an experiment: teacher, baseline, student, report. The one place that wires the parts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import set_seed

from distill_nlp.cache_filling import cache_teacher_logits
from distill_nlp.config import STAGES, Experiment
from distill_nlp.data import content_hash
from distill_nlp.errors import DistillError, UsageError
from distill_nlp.fingerprints import Fingerprints, plain
from distill_nlp.loading import load_classifier, load_config
from distill_nlp.losses import LOSSES, CrossEntropyLoss, DistillationLoss
from distill_nlp.materials import Materials
from distill_nlp.report import REPORT_FILE, build_report, write_report
from distill_nlp.stage_training import Say, TrainingJob, same_budget, training_arguments, versions
from distill_nlp.stages import Fingerprint, StageFolder, read_json, write_json
from distill_nlp.teacher import CachedTeacher

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
        self._say = say
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
            self._teacher_stage()
        for seed in self.experiment.seeds:
            if "baseline" in stages:
                self._baseline_stage(seed)
            if "student" in stages:
                self._student_stage(seed)
        # The other ranks are not needed for the report, and a barrier would time out on a long one.
        return self._report_stage() if "report" in stages and self.state.is_main_process else None

    def say(self, line: str) -> None:
        """One line for the user, from the main rank."""
        if self.state.is_main_process:
            self._say(line)

    def _check_materials(self) -> None:
        """Loads data and tokenizer before the first stage, so that what is wrong with them shows at once."""
        splits = self.materials.splits
        parts = [f"{len(splits.train):,} train"]
        if splits.teacher_train is not splits.train:
            parts.append(f"{len(splits.teacher_train):,} for the teacher")
        if splits.unlabeled is not None:
            parts.append(f"{len(splits.unlabeled):,} unlabeled")
        parts += [f"{len(splits.validation):,} validation", f"{len(splits.test):,} test"]
        labels = ", ".join(self.materials.label_names)
        self.say(f"{'data':<20} {self.experiment.data.dataset}: {', '.join(parts)}; labels {labels}")
        for note in splits.notes:
            self.say(f"{'data':<20} {note}")
        self.materials.check_tokenizers()

    def _is_done(self, folder: StageFolder, fingerprint: Fingerprint, name: str) -> bool:
        """Whether the stage can be left out; says so, and why not where settings changed. The same on all ranks."""
        # One rank looks: two could see the folder at different moments, and one train while the other leaves.
        changes = broadcast_object_list([folder.changes(fingerprint)])[0]
        if changes == []:
            self.say(f"{name:<20} done already: {folder.path}")
            return True
        if changes:
            shown = "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")
            self.say(f"{name:<20} settings changed, so it is done again ({shown})")
        return False

    def _job(self, name: str, folder: StageFolder, fingerprint: Fingerprint, **parts: Any) -> TrainingJob:
        return TrainingJob(
            name=name,
            folder=folder,
            fingerprint=fingerprint,
            validation=self.materials.validation,
            tokenizer=self.materials.tokenizer,
            max_length=self.experiment.data.max_length,
            **parts,
        )

    # ---- the teacher ----

    @property
    def _teacher_source(self) -> tuple[str, str | None]:
        """Where the fine-tuned teacher lies: folder or Hub id, and revision."""
        settings = self.experiment.teacher
        if self.materials.finished_teacher is not None:
            return settings.model or "", settings.revision
        return str(self._finished(self.root / "teacher", self.prints.teacher, "teacher")), None

    def _finished(self, path: Path, fingerprint: Fingerprint, stage: str) -> Path:
        """The folder of a stage that is finished with just these settings.

        Raises:
            UsageError: it is not finished, or was made with other settings.
        """
        changes = StageFolder(path).changes(fingerprint)
        if changes is None:
            raise UsageError(
                f"there is no finished {stage} in {path}; run the stage {stage} first (distill-nlp run CONFIG --stages "
                f"{stage})"
            )
        if changes:
            raise UsageError(
                f"the {stage} in {path} was made with other settings ({'; '.join(changes[:3])}); run the stage {stage} "
                "again, or go back to its settings"
            )
        return path

    def _teacher_stage(self) -> None:
        if self.materials.finished_teacher is not None:
            name = self.experiment.teacher.model
            self.say(f"{'teacher':<20} {name} is a classifier for these labels already: not trained")
            return
        folder = StageFolder(self.root / "teacher")
        if self._is_done(folder, self.prints.teacher, "teacher"):
            return
        seed = self.experiment.teacher.seed
        set_seed(seed)
        self._job(
            "teacher",
            folder,
            self.prints.teacher,
            model=self.materials.new_teacher(),
            losses={"ce": CrossEntropyLoss()},
            train=self.materials.tokens(self.materials.splits.teacher_train),
            arguments=training_arguments(self.experiment.teacher_training(), folder.checkpoints, seed),
        ).run(self.say)

    # ---- baseline and student ----

    @property
    def _ce_arguments(self) -> dict[str, Any]:
        """Settings of the cross-entropy, which the baseline shares with the student; its weight means nothing there."""
        return self.experiment.losses["ce"].arguments() if "ce" in self.experiment.losses else {}

    def _baseline_stage(self, seed: int) -> None:
        """The student's twin: the same initial weights, as many steps, the labels alone."""
        name, folder = f"baseline, seed {seed}", StageFolder(self.root / "baseline" / f"seed-{seed}")
        pool = self.materials.splits.unlabeled
        fingerprint = self.prints.baseline(seed)
        if self._is_done(folder, fingerprint, name):
            return
        set_seed(seed)
        model = self.materials.new_student()
        train = self.materials.tokens(self.materials.splits.train)
        section = self.experiment.training
        arguments = training_arguments(section, folder.checkpoints, seed)
        if pool is not None:
            section = same_budget(section, arguments, len(train) + len(pool))
            arguments = training_arguments(section, folder.checkpoints, seed)
        losses: dict[str, DistillationLoss] = {"ce": CrossEntropyLoss(**self._ce_arguments)}
        self._job(name, folder, fingerprint, model=model, losses=losses, train=train, arguments=arguments).run(self.say)

    def _student_stage(self, seed: int) -> None:
        name, folder = f"student, seed {seed}", StageFolder(self.root / "student" / f"seed-{seed}")
        sections = self.experiment.losses
        fingerprint = self.prints.student(seed)
        if self._is_done(folder, fingerprint, name):
            return
        # The same seed at the same point as in the baseline's stage: both start from the same weights.
        set_seed(seed)
        model = self.materials.new_student()
        cached = self.materials.live_because is None
        source = self._teacher_source
        self._job(
            name,
            folder,
            fingerprint,
            model=model,
            losses={key: LOSSES[key](**section.arguments()) for key, section in sections.items()},
            weights={key: section.weight for key, section in sections.items()},
            teacher=CachedTeacher(load_config(*source)) if cached else load_classifier(*source),
            train=self._rows_with_logits if cached else self.materials.student_rows,
            arguments=training_arguments(self.experiment.training, folder.checkpoints, seed),
        ).run(self.say)

    @cached_property
    def _rows_with_logits(self) -> Any:
        """The students' rows with the teacher's logits beside them, the same for all seeds."""
        teacher, revision = self._teacher_source
        size = self.experiment.training.per_device_eval_batch_size
        try:
            return cache_teacher_logits(
                teacher,
                self.materials.student_rows,
                self.materials.tokenizer,
                self.experiment.cache_dir or self.root / "teacher_cache",
                mixed_precision=self.materials.mixed_precision,
                batch_size=size,
                revision=revision,
                say=lambda line: self.say(f"{'teacher cache':<20} {line}"),
            )
        except torch.OutOfMemoryError as error:
            hint = f"lower training.per_device_eval_batch_size (now {size}) or data.max_length"
            raise DistillError(f"teacher cache: out of memory; {hint}") from error

    def fill_cache(self) -> None:
        """Computes the teacher's logits of all rows that the students will learn from, ahead of their stage.

        Raises:
            UsageError: there is no finished teacher yet, or the students would not use the cache.
        """
        self._check_materials()
        if (reason := self.materials.live_because) is not None:
            raise UsageError(f"nothing to cache: {reason}")
        _ = self._rows_with_logits

    # ---- the report ----

    def _report_stage(self) -> dict[str, Any]:
        seeds = self.experiment.seeds
        prints = {"baseline": self.prints.baseline, "student": self.prints.student}
        folders = {
            kind: {seed: self._finished(self.root / kind / f"seed-{seed}", make(seed), kind) for seed in seeds}
            for kind, make in prints.items()
        }
        teacher, revision = self._teacher_source
        # Made of just these models, these rows and these settings, a report is not made again.
        fingerprint = plain(
            {
                "test": content_hash(self.materials.splits.test),
                "settings": self.experiment.report.model_dump(),
                "models": {f"{kind}-{seed}": make(seed) for kind, make in prints.items() for seed in seeds},
                "device": str(self.state.device),
            }
        )
        earlier = read_json(self.root / REPORT_FILE)
        if earlier is not None and earlier.get("run", {}).get("fingerprint") == fingerprint:
            self.say(f"{'report':<20} done already: {self.root / 'report.md'}")
            return earlier
        start = time.monotonic()
        report = build_report(
            teacher=teacher,
            teacher_revision=revision,
            baselines=folders["baseline"],
            students=folders["student"],
            tokenizer=self.materials.tokenizer,
            test=self.materials.tokens_alone(self.materials.splits.test),
            label_names=self.materials.label_names,
            settings=self.experiment.report,
            device=self.state.device,
        )
        report["run"] = {
            "dataset": self.experiment.data.dataset,
            "stages": self._stage_records(),
            "versions": versions(),
            "fingerprint": fingerprint,
        }
        write_report(report, self.root)
        self.say(f"{'report':<20} {time.monotonic() - start:.0f} s → {self.root / 'report.md'}")
        return report

    def _stage_records(self) -> dict[str, Any]:
        """Steps, seconds and objective of each finished stage of these seeds."""
        names = ["teacher", *(f"{kind}/seed-{s}" for s in self.experiment.seeds for kind in ("baseline", "student"))]
        records = {}
        for name in names:
            if (record := StageFolder(self.root / name).record()) is not None:
                records[name] = {key: record[key] for key in ("objective", "steps", "seconds")}
        return records
