"""What a run decides by itself where its settings leave it open, once, as it begins: precision and batch sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from distill_nlp.config import CONFIG_FILE, Experiment
from distill_nlp.config_training import TrainingSection
from distill_nlp.doctor import Subject, fitting_batch_size
from distill_nlp.doctor.memory import free_memory
from distill_nlp.durable_files import read_json
from distill_nlp.errors import first_line
from distill_nlp.fingerprints import Fingerprints
from distill_nlp.materials import Materials
from distill_nlp.out_of_memory import memory_errors
from distill_nlp.precision import is_open, precision_of, prefers_bf16, settle_precision

_ROWS_FOR_LENGTH = 256
_USUAL_BATCH = TrainingSection.model_fields["per_device_train_batch_size"].default


class OpenSettings:
    """Finds what is open, and writes what is decided into the experiment.

    A run that goes on takes what its `config.json` says. The main rank decides for all; every rank must call it, and
    before anything that depends on the settings of a training is made.

    Args:
        experiment: changed in place.
        materials: of the experiment.
        say: gets what the line is on, and the line.
    """

    def __init__(self, experiment: Experiment, materials: Materials, say: Callable[[str, str], None]) -> None:
        self._experiment, self._materials, self._say = experiment, materials, say
        self._state = PartialState()

    def settle(self, begun: Path, measure: bool = True) -> None:
        """Decides all that is open.

        Args:
            begun: folder of the run whose record decides, if it began.
            measure: False: what no record decides is fp32, and the usual batch size.
        """
        record = read_json(begun / CONFIG_FILE)
        if is_open(self._experiment):
            settle_precision(self._experiment, self._decided(lambda: self._precision(record, measure)))
        training, teacher = self._experiment.training, self._experiment.teacher.training
        # The teacher's first: it inherits what the students' is until then.
        shared = self._experiment.teacher_training()
        free = self._least_free() if shared.auto_batch_size or training.auto_batch_size else (None, "")
        if shared.auto_batch_size:
            parts = [part for part in self._materials.teachers if part.finished is None]
            rows = _USUAL_BATCH * shared.gradient_accumulation_steps
            subject = self._subject(self._materials)
            size = self._decided(
                lambda: self._batch_size(
                    _recorded(record, rows, of_teacher=True) if parts else None,
                    rows,
                    measure and bool(parts),
                    "teacher",
                    [lambda part=part: fitting_batch_size(subject, rows, free, part) for part in parts],
                )
            )
            _set_batch_size(teacher, rows, size)
        if training.auto_batch_size:
            rows = _USUAL_BATCH * training.gradient_accumulation_steps
            phases = self._experiment.student_trainings() if self._experiment.phases else []
            subjects = [self._subject(self._materials.seen_by(phase)) for phase in phases]
            subjects = subjects or [self._subject(self._materials)]
            size = self._decided(
                lambda: self._batch_size(
                    _recorded(record, rows),
                    rows,
                    measure,
                    "student",
                    [lambda subject=subject: fitting_batch_size(subject, rows, free) for subject in subjects],
                )
            )
            owners = [self._experiment.teacher.training, *(phase.training for phase in self._experiment.phases)]
            _keep_steps(owners, training.gradient_accumulation_steps, size)
            _set_batch_size(training, rows, size)
        # What is decided counts as given, also where the settings had no such block: it is kept with the run.
        self._experiment.training, self._experiment.teacher.training = training, teacher

    def _subject(self, materials: Materials) -> Subject:
        # Of fingerprints that nobody keeps: they would be of settings that are not decided yet.
        return Subject(materials, Fingerprints(self._experiment, materials))

    def _least_free(self) -> tuple[int | None, str]:
        """The free memory of the device that has least of it; other work may lie on one of them."""
        found = gather_object([free_memory(self._state.device)])
        return next((one for one in found if one[0] is None), None) or min(found)

    def _decided(self, decide: Callable[[], Any]) -> Any:
        return broadcast_object_list([decide() if self._state.is_main_process else None])[0]

    def _precision(self, record: dict[str, Any] | None, measure: bool) -> bool:
        if record is not None or not measure:
            return precision_of(record)
        training, length = self._experiment.training, self._experiment.data.max_length
        usual = self._materials.splits.validation[:_ROWS_FOR_LENGTH]
        encoded = self._materials.tokenizer(usual["text"], usual.get("text_pair"), truncation=True, max_length=length)
        tokens = round(sum(map(len, encoded["input_ids"])) / len(usual["text"]))
        rows = training.per_device_train_batch_size
        if training.auto_batch_size:
            # As many as may fit.
            rows = _USUAL_BATCH * training.gradient_accumulation_steps
        try:
            chosen, line = prefers_bf16(self._materials.new_student, rows, tokens, self._state.device)
        except (RuntimeError, ValueError, IndexError) as error:
            # What does not fit is said by the checks that follow, and random tokens are not for every model.
            chosen, line = False, f"fp32: a step of the student could not be measured ({first_line(error)})"
        if line is not None:
            self._say("precision", line)
        return chosen

    def _batch_size(
        self, begun: int | None, rows: int, measure: bool, who: str, ways: Sequence[Callable[[], tuple[int, str]]]
    ) -> int:
        if begun is not None:
            self._say("batch size", f"{who}: {begun} rows at a time, as this run began")
            return begun
        if not measure:
            return _USUAL_BATCH
        with memory_errors(
            "batch size",
            f"a step of {who} on three of the longest rows does not fit: lower data.max_length, take a "
            "smaller model, or give training.per_device_train_batch_size with training.gradient_checkpointing",
        ):
            size, line = min((way() for way in ways), key=lambda found: found[0])
        self._say("batch size", f"{who}: {line}")
        return size


def _recorded(record: dict[str, Any] | None, rows: int, of_teacher: bool = False) -> int | None:
    """The batch size that a run began with, if a step had as many rows then."""
    if record is None:
        return None
    given = {**(record.get("training") or {})}
    if of_teacher:
        given |= (record.get("teacher") or {}).get("training") or {}
    size = given.get("per_device_train_batch_size", _USUAL_BATCH)
    return size if size * given.get("gradient_accumulation_steps", 1) == rows else None


def _keep_steps(owners: Sequence[TrainingSection], accumulation: int, size: int) -> None:
    """Has the trainings that share only a half of their batch size with the rest take as many rows a step as before.

    Args:
        owners: settings of their own over the shared ones.
        accumulation: that is shared until now.
        size: that fits, and is to be shared.
    """
    for own in owners:
        named = {"per_device_train_batch_size", "gradient_accumulation_steps"} & own.model_fields_set
        if named == {"per_device_train_batch_size"}:
            own.gradient_accumulation_steps = accumulation
        elif named == {"gradient_accumulation_steps"}:
            rows = _USUAL_BATCH * own.gradient_accumulation_steps
            _set_batch_size(own, rows, math.gcd(rows, size))


def _set_batch_size(section: TrainingSection, rows: int, size: int) -> None:
    section.per_device_train_batch_size, section.gradient_accumulation_steps = size, rows // size
    section.auto_batch_size = False
