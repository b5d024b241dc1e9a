"""What a whole run spends its time on, by wrapping what computes in it.

    python benchmarks/speed/idle.py FILE run CONFIG ...     # as `distill-nlp run CONFIG ...`; its seconds go to FILE

Counted as work: the Trainer's `training_step` (teacher where it is live, student forward and backward, and bringing
the batch to the device), clipping and the optimizer's step, the forward passes of evaluations, those that fill the
teacher's cache and those of the report, and its measurement of speed and memory. All else is idle: imports, data, the
doctor, making and padding batches, logs and callbacks, keys and shards of the cache, checkpoints, the scheduler,
statistics and plots. On a GPU each piece is waited for, which takes away what would overlap: the share is then an upper
bound.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from measuring import Figures, wait_for

from distill_nlp import DistillationTrainer, cli, inference
from distill_nlp.durable_files import write_json
from distill_nlp.report.speed import Run
from distill_nlp.report_stage import ReportStage
from distill_nlp.student_stages import StudentStages
from distill_nlp.teacher_stages import TeacherStages

STAGES = {
    "teacher": (TeacherStages, "train"),
    "baseline": (StudentStages, "baseline"),
    "student": (StudentStages, "student"),
    "report": (ReportStage, "make"),
}
FORWARD, STEP = "forward and backward", "clipping and optimizer"
EVALUATION, ANSWERS = "evaluations", "answers, for the cache and the report"
SPEED = "speed and memory, for the report"
WORK = {
    FORWARD: [(DistillationTrainer, "training_step")],
    STEP: [(Accelerator, "clip_grad_norm_"), (AcceleratedOptimizer, "step")],
    EVALUATION: [(DistillationTrainer, "prediction_step")],
    ANSWERS: [(inference, "forward_with_features")],
    SPEED: [(Run, "seconds")],
}
IDLE, AROUND, RUN = "all else: idle", "around them: start and end, imports, data, doctor", "the whole run"
Seconds = dict[str, dict[str, float]]
"""Of each stage: its pieces, by name, and the whole of it under `RUN`."""


class Stopwatch:
    """Seconds of what runs inside a stage."""

    def __init__(self) -> None:
        self.seconds: Seconds = {}
        self._stage: str | None = None
        self._is_in_piece = False
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def stage(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, as a stage."""

        @wraps(function)
        def timed(*arguments: Any, **settings: Any) -> Any:
            self._stage = name
            try:
                with self._counted(RUN):
                    return function(*arguments, **settings)
            finally:
                self._stage = None

        return timed

    def piece(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time counts where a stage runs it and no other piece does."""

        @wraps(function)
        def timed(*arguments: Any, **settings: Any) -> Any:
            if self._stage is None or self._is_in_piece:
                return function(*arguments, **settings)
            self._is_in_piece = True
            try:
                with self._counted(name):
                    return function(*arguments, **settings)
            finally:
                self._is_in_piece = False

        return timed

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        wait_for(self._device)
        start = time.perf_counter()
        yield
        wait_for(self._device)
        found = self.seconds.setdefault(self._stage or "", {})
        found[name] = found.get(name, 0.0) + time.perf_counter() - start


def pieces_of(arguments: Sequence[str]) -> Seconds:
    """Runs `distill-nlp` with these arguments and gives the seconds of its stages' pieces.

    Args:
        arguments: of the command.

    Raises:
        SystemExit: the command failed, or one of its stages was not run.
    """
    watch = Stopwatch()
    places = [(watch.stage, name, *place) for name, place in STAGES.items()]
    places += [(watch.piece, name, *place) for name, own in WORK.items() for place in own]
    with ExitStack() as patches:
        for wrapped, name, owner, attribute in places:
            wrapper = wrapped(name, getattr(owner, attribute))
            patches.enter_context(mock.patch.object(owner, attribute, wrapper))
        code = cli.main(arguments)
    # A stage that was finished already did nothing.
    missing = [name for name in STAGES if not set(watch.seconds.get(name, {})) - {RUN}]
    if code or missing:
        raise SystemExit(f"no idle share: distill-nlp {arguments[0]} ended with code {code}; not run: {missing}")
    return watch.seconds


def stage_figures(found: Seconds, whole: float) -> dict[str, Figures]:
    """Seconds and idle shares of the stages, of what is around them, and of the run.

    Args:
        found: as of `pieces_of`.
        whole: of the process, from its start to its end.
    """
    figures: dict[str, Figures] = {}
    for name in STAGES:
        seconds = found[name][RUN]
        figures[name] = {"seconds": seconds, "share": seconds / whole, "idle": 1 - _work(found[name]) / seconds}
    around = whole - sum(found[name][RUN] for name in STAGES)
    figures[AROUND] = {"seconds": around, "share": around / whole, "idle": 1.0}
    idle = 1 - sum(_work(found[name]) for name in STAGES) / whole
    figures[RUN] = {"seconds": whole, "share": 1.0, "idle": idle}
    return figures


def piece_figures(found: Seconds, whole: float) -> dict[str, Figures]:
    """Seconds of the pieces, over all stages; arguments as of `stage_figures`."""
    pieces = {name: sum(found[stage].get(name, 0.0) for stage in STAGES) for name in WORK}
    pieces |= {IDLE: whole - sum(pieces.values()), RUN: whole}
    return {name: {"seconds": seconds, "share": seconds / whole} for name, seconds in pieces.items()}


def _work(pieces: dict[str, float]) -> float:
    return sum(seconds for name, seconds in pieces.items() if name != RUN)


if __name__ == "__main__":
    write_json(sys.argv[1], pieces_of(sys.argv[2:]))
