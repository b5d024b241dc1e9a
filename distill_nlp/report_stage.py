"""The last stage of an experiment: the report of its finished models."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from distill_nlp.data import content_hash
from distill_nlp.durable_files import read_json
from distill_nlp.fingerprints import Fingerprints, plain
from distill_nlp.loading import checkpoint_print
from distill_nlp.manifests import damage
from distill_nlp.report import (
    NO_PLOTS,
    PREDICTIONS_FILE,
    REPORT_FILE,
    REPORT_MANIFEST_FILE,
    SCHEMA_VERSION,
    ReportTeacher,
    build_report,
    can_plot,
    machine,
    read_earlier,
    read_exports,
    read_rows,
    write_report,
)
from distill_nlp.stage_runner import StageRunner
from distill_nlp.stages import StageFolder
from distill_nlp.teacher_stages import TeacherStages
from distill_nlp.training_settings import versions


class ReportStage:
    """Finds the finished models of a run and reports on them; on the main rank alone.

    Args:
        runner: of the experiment.
        prints: its fingerprints.
        teachers: where the teachers lie.
    """

    def __init__(self, runner: StageRunner, prints: Fingerprints, teachers: TeacherStages) -> None:
        self.experiment, self.materials, self.root = runner.experiment, runner.materials, runner.root
        self.runner, self.prints, self.teachers = runner, prints, teachers

    def make(self, again: bool = False, fresh: bool = False) -> dict[str, Any]:
        """The report, written; the one that is there where it is of the same models, rows and settings.

        Args:
            again: write it anew all the same, from what it found.
            fresh: leave even that out of account.

        Raises:
            UsageError: a stage is not finished, or was made with other settings.
        """
        materials, test = self.materials, self.materials.splits.test
        makers = {"baseline": self.prints.baseline, "student": self.prints.student}
        folders = {
            kind: {
                seed: self.runner.finished(self.root / kind / f"seed-{seed}", make(seed), kind)
                for seed in self.experiment.seeds
            }
            for kind, make in makers.items()
        }
        teachers = self._teachers()
        fingerprint = self._fingerprint(makers) | {"weights": self._weights(folders, teachers)}
        earlier = read_json(self.root / REPORT_FILE)
        problem = damage(self.root, REPORT_MANIFEST_FILE, (REPORT_FILE, PREDICTIONS_FILE))
        if problem is not None:
            if (self.root / REPORT_FILE).exists():
                self.runner.say("report", f"the earlier one is left out, as it cannot be trusted: {problem}")
            earlier, fresh = None, True
        if not again and earlier is not None and self._is_the_same(earlier, fingerprint):
            self.runner.say("report", f"done already: {self.root / 'report.md'}")
            return earlier
        start = time.monotonic()
        device, tokens = self.runner.state.device, materials.tokens_alone(test)
        known = None if fresh else read_earlier(self.root, fingerprint, np.array(tokens["labels"]), machine(device))
        if known is not None:
            costs = ", speed and memory" if known.costs is not None else ""
            self.runner.say("report", f"logits{costs} as the earlier report found them")
        report = build_report(
            teachers=teachers,
            baselines=folders["baseline"],
            students=folders["student"],
            tokenizer=materials.tokenizer,
            test=tokens,
            label_names=materials.label_names,
            settings=self.experiment.report,
            mean=self.experiment.teacher.mean,
            device=device,
            rows=read_rows(test, tokens, materials.tokenizer),
            earlier=known,
        )
        if exports := read_exports(folders["student"]):
            report["exports"] = exports
        report["run"] = {
            "dataset": self.experiment.data.dataset,
            "stages": self._stage_records(),
            "versions": versions(),
            "fingerprint": fingerprint,
        }
        write_report(report, self.root)
        self.runner.say("report", f"{time.monotonic() - start:.0f} s → {self.root / 'report.md'}")
        if not can_plot():
            self.runner.say("report", f"{NO_PLOTS}; then: distill-nlp report {self.root}")
        return report

    def _teachers(self) -> list[ReportTeacher]:
        found = []
        for part in self.materials.teachers:
            path, revision = self.teachers.source(part)
            rows = self.materials.tokens_alone(self.materials.splits.test, part)
            settings = part.settings
            found.append(ReportTeacher(path, rows, part.tokenizer, revision, settings.weight, settings.restrict_labels))
        return found

    def _fingerprint(self, makers: dict[str, Any]) -> dict[str, Any]:
        """Of what the report is made."""
        seeds = self.experiment.seeds
        return plain(
            {
                "test": content_hash(self.materials.splits.test),
                "settings": self.experiment.report.model_dump(),
                "models": {f"{kind}-{seed}": make(seed) for kind, make in makers.items() for seed in seeds},
                # A GPU has a number under a launcher, and none without.
                "device": self.runner.state.device.type,
            }
        )

    def _weights(self, folders: dict[str, dict[int, Any]], teachers: list[ReportTeacher]) -> dict[str, Any]:
        """Of the models as they lie there: one that was removed and trained again with the same settings is another."""
        found = {f"{kind}-{seed}": path for kind, seeds in folders.items() for seed, path in seeds.items()}
        made = {name: checkpoint_print(str(path)) for name, path in found.items()}
        return made | {"teachers": [checkpoint_print(teacher.path, teacher.revision) for teacher in teachers]}

    def _is_the_same(self, report: dict[str, Any], fingerprint: dict[str, Any]) -> bool:
        return (
            report.get("schema_version") == SCHEMA_VERSION
            # Without it, its intervals drew seeds with replacement.
            and "rows_interval" in report["comparison"]["difference"]
            and ({"weights": fingerprint["weights"]} | report.get("run", {}).get("fingerprint", {})) == fingerprint
            and damage(self.root, REPORT_MANIFEST_FILE) is None
        )

    def _stage_records(self) -> dict[str, Any]:
        """Steps, seconds, energy and objective of each finished stage of these seeds, and since when they count."""
        # Of a teacher that came finished, a folder here is of an earlier run.
        names = [part.name for part in self.materials.teachers if part.finished is None]
        for seed in self.experiment.seeds:
            before = [f"student/seed-{seed}-phase-{i}" for i in range(1, len(self.experiment.phases))]
            names += [f"baseline/seed-{seed}", *before, f"student/seed-{seed}"]
        records = {}
        for name in names:
            if (record := StageFolder(self.root / name).record()) is not None:
                keys = ("objective", "steps", "seconds", "energy", "resumed_from")
                records[name] = {key: record.get(key) for key in keys}
        return records
