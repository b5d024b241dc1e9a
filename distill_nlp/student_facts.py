"""What the folder of a run knows of a finished student, as its model card says it."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import yaml

from distill_nlp.config import DataSection, Experiment
from distill_nlp.config_training import task_metric
from distill_nlp.durable_files import read_json
from distill_nlp.errors import UsageError
from distill_nlp.hub.card import RECIPE, CardFacts, Phase, Score
from distill_nlp.hub.files import INDEX, WEIGHTS
from distill_nlp.hub.private import Private, hub_name
from distill_nlp.loading import checkpoint_print
from distill_nlp.losses.base import MULTI_LABEL
from distill_nlp.report import REPORT_FILE
from distill_nlp.report.render import summary_lines, table_rows, verdict
from distill_nlp.stages import STAGE_FILE, StageFolder

RUN_FILE = "config.json"
_SEEDS: list[int] = Experiment.model_fields["seeds"].default
_TEST_SPLIT: str = DataSection.model_fields["test_split"].default


@dataclass
class FinishedStudent:
    """A student to be pushed.

    Args:
        folder: of the student.
        run: of the run that made it, where it lies in one.
        note: which one was picked.
    """

    folder: Path
    run: Path | None = None
    note: str | None = None

    @property
    def seed(self) -> str | None:
        """That it was trained with, by its folder's name."""
        found = re.fullmatch(r"seed-(\d+)", self.folder.name)
        return found[1] if found and self.run else None

    @property
    def record(self) -> dict[str, Any]:
        """What its stage left, or nothing.

        Raises:
            DistillError: the student is not as it was written.
        """
        return StageFolder(self.folder).record() or {}


def find_student(path: Path) -> FinishedStudent:
    """The student in a folder, or of a run the one whose seed did best on the validation rows.

    By the test rows would be picking by what the report claims.

    Raises:
        UsageError: there is no finished student.
        DistillError: one is not as it was written.
    """
    if not path.is_dir():
        raise UsageError(f"there is no folder {path}")
    if (path / "student").is_dir() or (path / "student.partial").is_dir():
        return _best_of(path)
    if ".partial" in str(path):
        raise UsageError(f"{path} is not finished; the same `distill-nlp run` goes on with it")
    if re.search(r"-phase-\d+$", path.name):
        raise UsageError(f"{path} is a phase on the way to {path.name.partition('-phase-')[0]}; push that")
    stage = FinishedStudent(path).record.get("stage", "student")
    if not str(stage).startswith("student"):
        raise UsageError(f"{path} is no student, but: {stage}")
    config = read_json(path / "config.json")
    if config is None or not any((path / name).is_file() for name in (WEIGHTS, INDEX)):
        raise UsageError(f"{path} holds no model (config.json and {WEIGHTS}): give the folder of a finished student")
    if not any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or []):
        raise UsageError(f"{path} holds no text classifier (its config names {config.get('architectures')})")
    run = path.absolute().parent.parent
    known = path.absolute().parent.name == "student" and (run / RUN_FILE).is_file()
    return FinishedStudent(path, run if known else None)


def _best_of(run: Path) -> FinishedStudent:
    folders = sorted(run.glob("student/seed-*"), key=lambda folder: _number(folder.name))
    finished = [f for f in folders if re.fullmatch(r"seed-\d+", f.name) and (f / STAGE_FILE).is_file()]
    if not finished:
        raise UsageError(f"{run} has no finished student yet; the same `distill-nlp run` goes on with it")
    students = [find_student(folder) for folder in finished]
    students, others = _of_one_kind(students, (read_json(run / RUN_FILE) or {}).get("seeds", _SEEDS))
    metric = task_metric(_problem_type(read_json(finished[0] / "config.json") or {}))
    reached = [student.record.get("validation", {}).get(metric) for student in students]
    if len(students) == 1 or any(value is None for value in reached):
        chosen, why = students[0], "the first" if len(students) > 1 else "the only one"
    else:
        best = max(range(len(students)), key=lambda i: reached[i])  # of equals the first
        chosen, why = students[best], f"best validation {metric} ({reached[best]:.4f}) of {len(students)}"
    left_out = f"; made with other settings, and left out: seed {', '.join(map(str, others))}" if others else ""
    chosen.note = f"student of seed {chosen.seed}: {why}{left_out}"
    return chosen


def _of_one_kind(students: list[FinishedStudent], seeds: Sequence[int]) -> tuple[list[FinishedStudent], list[str]]:
    """Those made as the first of these seeds was, which the run was last begun for; and the seeds of the others."""
    prints = [_without_seed(student.record.get("fingerprint", {})) for student in students]
    first = next((i for i, student in enumerate(students) if str(student.seed) in map(str, seeds)), 0)
    alike = [found == prints[first] for found in prints]
    kept = [student for student, same in zip(students, alike, strict=True) if same]
    return kept, [str(student.seed) for student, same in zip(students, alike, strict=True) if not same]


def _without_seed(fingerprint: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in fingerprint.items() if key != "seed"}
    return kept | ({"after": _without_seed(kept["after"])} if "after" in kept else {})


def _number(name: str) -> int:
    found = re.search(r"\d+", name)
    return int(found[0]) if found else 0


def _problem_type(config: dict[str, Any]) -> str:
    return config.get("problem_type") or "single_label_classification"


def student_facts(found: FinishedStudent, private: Private) -> CardFacts:
    """All that can be said of a student, without a guess; what is private is left out.

    Raises:
        DistillError: the student is not as it was written.
    """
    config, record = read_json(found.folder / "config.json") or {}, found.record
    report, why_not = _report_on(found, record)
    experiment = _experiment(found, record, report)
    names = {int(i): str(name) for i, name in (config.get("id2label") or {}).items()}
    teacher, data = experiment.get("teacher") or {}, experiment.get("data") or {}
    fingerprint = record.get("fingerprint") or {}
    facts = CardFacts(
        name=found.folder.name,
        labels=[names[i] for i in sorted(names)],
        several_labels=_problem_type(config) == MULTI_LABEL,
        base_model=_origin(experiment),
        teacher=_teacher(teacher),
        dataset=hub_name(data.get("dataset")) if data.get("dataset") != "synthetic" else None,
        dataset_name=_data_name(data.get("dataset"), private),
        dataset_config=data.get("config_name"),
        test_split=data.get("test_split", _TEST_SPLIT) if experiment else None,
        objective=record.get("objective"),
        recipe=_recipe(record, fingerprint),
        earlier_phases=_earlier_phases(found.folder, fingerprint),
        parameters=_parameters(found.folder),
        size_mb=sum(f.stat().st_size for f in found.folder.glob("model*.safetensors")) / 1e6,
        max_length=(fingerprint.get("data") or {}).get("max_length"),
        no_report=why_not,
        validation={
            k: v for k, v in (record.get("validation") or {}).items() if k in ("accuracy", "f1_macro", "f1_micro")
        },
        versions=record.get("versions") or {},
        command="distill-nlp run config.yaml" if experiment else None,
        settings=_settings(experiment, private) if experiment else None,
    )
    if report is not None:
        _add_report(facts, report, found.seed)
    return facts


def _experiment(found: FinishedStudent, record: dict[str, Any], report: dict[str, Any] | None) -> dict[str, Any]:
    """The settings of the run that made the student, as it keeps them itself.

    Students of earlier versions keep none. The run's own are those of the last one begun in its folder, and are taken
    where they name the data set that the report on this student names.
    """
    own = record.get("run_settings")
    if own is not None or found.run is None or report is None:
        return own or {}
    of_run = read_json(found.run / RUN_FILE) or {}
    named, kept = (report.get("run") or {}).get("dataset"), (of_run.get("data") or {}).get("dataset")
    return of_run if named and kept and _is_the_same_data(named, kept) else {}


def _is_the_same_data(named: str, kept: str) -> bool:
    """Whether a data set as it was given is the one in the settings of a run, which keep a local one as absolute."""
    given = tuple(part for part in Path(named).parts if part not in ("..", "~"))
    return bool(given) and Path(kept).parts[-len(given) :] == given


def _report_on(found: FinishedStudent, record: dict[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
    """The report, where it is one on just this student; else why there is none."""
    report = read_json(found.run / REPORT_FILE) if found.run else None
    if report is None:
        return None, None
    fingerprint, name = (report.get("run") or {}).get("fingerprint") or {}, f"student-{found.seed}"
    measured = (fingerprint.get("models") or {}).get(name)
    seeds = report.get("models", {}).get("student", {}).get("seeds", {})
    # Reports of earlier versions do not say which weights they are of.
    now = checkpoint_print(str(found.folder))
    same_weights = (fingerprint.get("weights") or {}).get(name, now) == now
    if found.seed in seeds and record and measured == record.get("fingerprint") and same_weights:
        return report, None
    return None, "The report of the run is not on this student as it is now, so none of its figures is given here."


def _add_report(facts: CardFacts, report: dict[str, Any], seed: str | None) -> None:
    models, seeds = report["models"], report["models"]["student"]["seeds"]
    metric = report.get("metric", "accuracy")
    for name in ("accuracy", "f1_macro", "f1_micro"):
        if name not in seeds[seed]:
            continue
        details: dict[str, Any] = {"seed": int(seed), "test_rows": report["test_rows"]}
        if len(seeds) > 1:
            details |= {"mean_of_seeds": models["student"][name]["mean"], "seeds": len(seeds)}
        interval = report["comparison"].get(f"{metric}_intervals", {}).get("student") if name == metric else None
        if interval:
            over = "test rows" if len(seeds) == 1 else "test rows and seeds, of the mean of seeds"
            details |= {"interval_95": interval, "interval_over": over}
        facts.scores = [*facts.scores, Score(name, seeds[seed][name], details)]
    facts.test_rows = report["test_rows"]
    facts.comparison = [("", "teacher", "baseline", "student"), *table_rows(report)]
    facts.summary = [verdict(report), *summary_lines(report)]
    machine = report["machine"]
    facts.speed_note = (
        f"Speed on {machine['name']} ({machine['device']}, {machine['threads']} threads), models in turns on the same "
        "rows at their real lengths, without tokenization."
    )
    if len(seeds) == 1:
        facts.limits = [*facts.limits, "One seed: the intervals say nothing of other seeds."]


def _origin(experiment: dict[str, Any]) -> str | None:
    """Id on the Hub of what the student started from."""
    student = experiment.get("student") or {}
    if student.get("from_teacher"):
        return hub_name((experiment.get("teacher") or {}).get("model"))
    return hub_name(student.get("model"))


def _teacher(teacher: dict[str, Any]) -> str | None:
    if not teacher:
        return None
    named = hub_name(teacher.get("model"))
    kind = (teacher.get("config") or {}).get("model_type")
    one = named or (f"a {kind} trained from scratch" if kind else "a model that is not on the Hub")
    more = len(teacher.get("ensemble") or [])
    return f"{one} and {more} more" if more else one


def _data_name(dataset: str | None, private: Private) -> str | None:
    if dataset == "synthetic":
        return "reviews generated by distill_nlp"
    return private.public_name(dataset) if dataset else None


def _recipe(record: dict[str, Any], fingerprint: dict[str, Any]) -> dict[str, Any]:
    training = fingerprint.get("training") or {}
    recipe = {name: training[name] for name in RECIPE if training.get(name) not in (None, -1)}
    recipe |= {"steps": record["steps"]} if "steps" in record else {}
    return recipe | ({"seed": fingerprint["seed"]} if "seed" in fingerprint else {})


def _earlier_phases(folder: Path, fingerprint: dict[str, Any]) -> list[Phase]:
    """The phases before the last, first to last; what is only in their folders, where these are still of them."""
    prints: list[dict[str, Any]] = []
    while isinstance(before := fingerprint.get("after"), dict):
        prints.insert(0, fingerprint := before)
    phases = []
    for i, own in enumerate(prints, 1):
        record = read_json(folder.with_name(f"{folder.name}-phase-{i}") / STAGE_FILE) or {}
        record = record if record.get("fingerprint") == own else {}
        phases.append(Phase(record.get("objective"), _recipe(record, own)))
    return phases


def _settings(experiment: dict[str, Any], private: Private) -> str:
    """The settings as YAML that `distill-nlp run` takes, once the reader has put the data and models in place."""
    kept = {key: value for key, value in experiment.items() if key not in ("output_dir", "cache_dir")}
    kept = {"output_dir": "runs/student", **private.scrubbed(kept, "PATH/")}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def _parameters(folder: Path) -> int | None:
    """Counted in the headers of the weights, without loading them."""
    total, files = 0, [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("model-*.safetensors"))
    for file in files:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > 100_000_000:
                raise UsageError(f"{file} is no safetensors file")
            header = json.loads(stream.read(length))
        total += sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total or None
