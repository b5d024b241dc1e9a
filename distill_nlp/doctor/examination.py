"""All checks on an experiment, before its first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import numpy as np

from distill_nlp.config import STAGES
from distill_nlp.doctor import models, rows, settings, texts
from distill_nlp.doctor.findings import Finding, guarded
from distill_nlp.doctor.fitting import check_student_memory
from distill_nlp.doctor.labels import check_labels
from distill_nlp.doctor.multi_label import check_class_rates, check_multi_label_teacher
from distill_nlp.doctor.subject import AUTOCAST, SPLITS, Subject
from distill_nlp.doctor.teacher_accuracy import check_softness, check_teacher_accuracy
from distill_nlp.doctor.timing import check_run_time
from distill_nlp.doctor.trace import no_trace
from distill_nlp.fingerprints import Fingerprints
from distill_nlp.inference import predict_logits
from distill_nlp.labels import label_order
from distill_nlp.losses.base import MULTI_LABEL, ModelShape
from distill_nlp.materials import Materials
from distill_nlp.precision import computes_bf16
from distill_nlp.student import label_arguments
from distill_nlp.teacher_parts import TeacherPart
from distill_nlp.training_settings import mixed_precision

ACCURACY_ROWS = 200
TIMING_SECONDS = 15.0


def examine(
    materials: Materials,
    prints: Fingerprints,
    stages: Sequence[str] = STAGES,
    accuracy_rows: int = ACCURACY_ROWS,
    seconds: float = TIMING_SECONDS,
) -> list[Finding]:
    """Looks for what can be known to be wrong before the first step.

    It leaves no trace: no file, no change of a random generator, a tokenizer or a model of the materials. It waits for
    no other rank: in a distributed launch one calls it, after all have loaded `materials.splits`.

    Args:
        materials: of the experiment.
        prints: of its stages, which say what is finished.
        stages: that are to run; without baseline and student, the student is not looked at.
        accuracy_rows: validation rows that a finished teacher answers.
        seconds: for timing steps, roughly; 0 leaves the time estimate out.

    Returns:
        One finding or several for each check. `exit_code` says whether one is a stop.

    Example:
        >>> findings = examine(materials, Fingerprints(experiment, materials))
        >>> exit_code(findings)
        0
    """
    with no_trace():
        return _examined(materials, prints, stages, accuracy_rows, seconds)


def _examined(
    materials: Materials, prints: Fingerprints, stages: Sequence[str], accuracy_rows: int, seconds: float
) -> list[Finding]:
    # A function of its own: its models are gone when memory is given back.
    found = _Findings()
    subject = Subject(materials, prints)
    found.add("settings", lambda: _check_settings(found, subject))
    # Without data or tokenizers, everything else would only repeat that.
    if not (
        found.add("data", lambda: _load_data(materials))
        and found.add("tokenizers", lambda: _load_tokenizers(materials))
    ):
        return found.all
    with ExitStack() as kept:
        for tokenizer in [materials.tokenizer, *(part.tokenizer for part in materials.teachers)]:
            kept.enter_context(texts.unchanged(tokenizer))
        for part in materials.teachers:
            found.add("labels", lambda part=part: _labels(subject, part))
        found.add("rows", lambda: _check_rows(found, subject))
        found.add("texts", lambda: _check_texts(found, subject))
        if {"baseline", "student"} & set(stages):
            found.add("student", lambda: _check_student(found, subject))
        for part in materials.teachers:
            found.add("teacher accuracy", lambda part=part: _answers(subject, part, accuracy_rows))
        if seconds > 0 and not found.stopped:
            found.add("time", lambda: check_run_time(subject, stages, seconds))
    return found.all


def examine_teachers(materials: Materials, prints: Fingerprints, accuracy_rows: int = ACCURACY_ROWS) -> list[Finding]:
    """The checks of the teachers' answers alone, for after their training; leaves no trace either.

    Args:
        materials, prints, accuracy_rows: as in `examine`.
    """
    with no_trace():
        return _examined_teachers(materials, prints, accuracy_rows)


def _examined_teachers(materials: Materials, prints: Fingerprints, accuracy_rows: int) -> list[Finding]:
    found = _Findings()
    if not found.add("tokenizers", lambda: _load_tokenizers(materials)):
        return found.all
    subject = Subject(materials, prints)
    with ExitStack() as kept:
        for part in materials.teachers:
            kept.enter_context(texts.unchanged(part.tokenizer))
            found.add("teacher accuracy", lambda part=part: _answers(subject, part, accuracy_rows))
    return found.all


class _Findings:
    """Findings in their order; the same stop is said once."""

    def __init__(self) -> None:
        self.all: list[Finding] = []

    def add(self, check: str, run: Callable[[], Finding | Iterable[Finding] | None]) -> bool:
        """Runs a check, or a group of them that add their own; whether it found no stop."""
        found = guarded(check, lambda: run() or [])
        said = {finding.what for finding in self.all if finding.level == "stop"}
        self.all += [finding for finding in found if finding.what not in said]
        return all(finding.level != "stop" for finding in found)

    @property
    def stopped(self) -> bool:
        return any(finding.level == "stop" for finding in self.all)


def _load_data(materials: Materials) -> list[Finding]:
    splits = materials.splits
    counts = {"train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)}
    if splits.teacher_train is not splits.train:
        counts["teacher_train"] = len(splits.teacher_train)
    found = [rows.check_row_counts(counts)]
    if splits.streams is not None:
        # Of the checks that follow, those of training rows are of these alone.
        found.append(Finding("ok", "data", f"training rows are streamed: {len(splits.train):,} of them are looked at"))
    return found


def _load_tokenizers(materials: Materials) -> list[Finding]:
    materials.check_tokenizers()
    _ = materials.readers
    return []


def _check_settings(found: _Findings, subject: Subject) -> None:
    experiment, device = subject.experiment, subject.device.type
    found.add("output folder", lambda: settings.check_output_folder(subject.root))
    found.add("learning rate", lambda: settings.check_learning_rate(experiment.training.learning_rate))
    # A phase's own are not the teacher's.
    teacher = subject.prints.experiment.teacher_training()
    if teacher.learning_rate != experiment.training.learning_rate:
        setting = "teacher.training.learning_rate"
        found.add("learning rate", lambda: settings.check_learning_rate(teacher.learning_rate, setting))
    precision = mixed_precision(experiment.training)
    found.add("precision", lambda: settings.check_precision(precision, device, computes_bf16(device)))


def _check_rows(found: _Findings, subject: Subject) -> None:
    task = subject.materials.splits.problem_type
    metric = subject.experiment.training.best_metric(task)
    columns = {name: subject.columns(name) for name in SPLITS}
    labels = {name: subject.labels(name) for name in SPLITS}
    names = subject.materials.splits.label_names
    held_out = {name: columns[name] for name in ("validation", "test")}
    found.add("duplicates", lambda: rows.check_leakage(columns["train"], held_out))
    reads_labels = "ce" in subject.experiment.losses
    found.add("label noise", lambda: rows.check_contradictions(columns["train"], labels["train"], reads_labels))
    found.add("splits", lambda: rows.check_splits_differ(columns["validation"], columns["test"]))
    check = check_class_rates if task == MULTI_LABEL else rows.check_classes
    found.add("classes", lambda: check(labels, names, metric))


def _check_texts(found: _Findings, subject: Subject) -> None:
    materials, data = subject.materials, subject.experiment.data
    tokenizer = materials.tokenizer
    found.add("special tokens", lambda: texts.check_special_tokens(tokenizer))
    found.add("unknown tokens", lambda: texts.check_unknown_tokens(subject.samples, tokenizer.unk_token))
    found.add(
        "truncation",
        lambda: texts.check_truncation(subject.samples, data.max_length, data.truncation_side, subject.readable()),
    )
    for part in materials.readers.values():
        setting = f"{part.where}.max_length"
        found.add(
            "truncation",
            lambda part=part, setting=setting: texts.check_truncation(
                subject.sample_for(part), part.max_length, data.truncation_side, subject.readable(part), setting
            ),
        )


def _check_student(found: _Findings, subject: Subject) -> None:
    """Layers, widths, attention, losses, memory."""
    materials = subject.materials
    if not found.add("layers", lambda: models.check_layers(materials.objective)):
        return
    objective, device = materials.objective, subject.device.type
    names = materials.splits.label_names
    reading = [name for name, loss in objective.losses.items() if loss.attention_pairs]
    has_pool = materials.splits.unlabeled is not None

    def sizes() -> Finding:
        student, teacher = subject.student, subject.lead_model
        shapes = ModelShape.from_config(student.config), ModelShape.from_config(teacher.config)
        return models.check_sizes(*shapes, student.num_parameters(), teacher.num_parameters())

    def embeddings() -> Finding:
        made = {"student": (materials.tokenizer, subject.student.config)}
        made["teacher"] = (materials.lead.tokenizer, subject.lead_model.config)
        return texts.check_vocabulary_size(
            {k: (max(t.get_vocab().values()), c.vocab_size) for k, (t, c) in made.items()}
        )

    def student_labels() -> list[Finding]:
        # The teacher's finding says what is well.
        finding = check_labels(names, None, subject.student.config)
        return [finding] if finding.level == "stop" else []

    def losses() -> list[Finding]:
        task = ModelShape.from_config(subject.student.config).problem_type
        return models.check_losses(objective, task, materials.live_because, has_pool)

    found.add("labels", student_labels)
    found.add("sizes", sizes)
    found.add("embeddings", embeddings)
    found.add("losses", losses)
    found.add(
        "student dropout",
        lambda: models.check_attention_dropout(subject.student.config, "student", device, subject.experiment.student),
    )
    if objective.needs_teacher:
        level = objective.token_level()
        for part in materials.teachers:
            found.add(
                "vocabularies",
                lambda part=part: texts.check_vocabularies(part.tokenizer, materials.tokenizer, level, part.name),
            )
    looked_at = {"student": subject.student, "teacher": subject.lead_model}
    if found.add("attention", lambda: models.check_attention(looked_at, reading)) and not found.stopped:
        found.add("memory", lambda: check_student_memory(subject))


def _labels(subject: Subject, part: TeacherPart) -> Finding:
    names = subject.materials.splits.label_names
    return check_labels(names, part.finished, None, part.settings.restrict_labels, part.name)


def _answers(subject: Subject, part: TeacherPart, accuracy_rows: int) -> list[Finding]:
    """What a finished teacher answers for validation rows; of one to be trained, what its training may suffer from."""
    materials, training = subject.materials, subject.experiment.training
    if subject.source(part) is None:
        config = materials.new_teacher(part).config
        return [
            Finding("ok", "teacher accuracy", f"{part.name} is to be fine-tuned: checked after that"),
            models.check_attention_dropout(config, part.where, subject.device.type),
        ]
    encoded = subject.encoded(materials.splits.validation, accuracy_rows, part)
    model = subject.teacher_model(part)
    names = materials.label_names
    wanted = type(model.config)(**label_arguments(names))
    order = label_order(model.config, wanted, part.settings.restrict_labels)
    # As the students are to learn from them.
    autocast = AUTOCAST.get(materials.mixed_precision)
    size = min(training.per_device_eval_batch_size, 16)
    logits = predict_logits(model, part.tokenizer, encoded, size, autocast=autocast)
    if order is not None:
        logits = logits[:, order]
    if broken := int((~np.isfinite(logits)).any(axis=1).sum()):
        return [_not_finite(part.name, broken, len(logits), materials.mixed_precision)]
    labels = np.array([row["labels"] for row in encoded])
    if materials.splits.problem_type == MULTI_LABEL:
        # No softness: of rare classes all but a few probabilities are near 0, with a good teacher too.
        return [check_multi_label_teacher(logits, labels, teacher=part.name)]
    soft = {
        name: loss.temperature.schedule.highest
        for name, loss in subject.new_objective().losses.items()
        if hasattr(getattr(loss, "temperature", None), "schedule")
    }
    accuracy = check_teacher_accuracy(logits, labels, names, order, teacher=part.name)
    return [accuracy, *check_softness(logits, soft, part.name)]


def _not_finite(teacher: str, broken: int, rows: int, precision: str) -> Finding:
    other = "--training.precision fp32, or bf16" if precision == "fp16" else "--training.precision fp32"
    return Finding(
        "stop",
        "teacher accuracy",
        f"{teacher}'s logits are not finite for {broken} of {rows} validation rows"
        + ("" if precision == "no" else f" in {precision}"),
        "no student can learn from them, and the run would end at the first",
        "another teacher: weights in it are broken" if precision == "no" else f"{other}; else the weights are broken",
    )
