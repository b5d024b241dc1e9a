"""What a distilled student's stage spends its time on, by wrapping what computes in it.

    python benchmarks/speed/idle.py FILE run CONFIG ...     # as `distill-nlp run CONFIG ...`; its seconds go to FILE

Counted as work: the Trainer's `training_step` (teacher where it is live, student forward and backward, and bringing
the batch to the device), clipping and the optimizer's step, each whole `evaluate`, and the teacher's forward passes
that fill its cache. All else in the stage is idle: making and padding batches, logs and callbacks, keys and shards of
the cache, checkpoints, the scheduler. On a GPU each piece is waited for, which takes away what would overlap: the share
is then an upper bound.
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
from distill_nlp.student_stages import StudentStages

FORWARD, STEP = "forward and backward", "clipping and optimizer"
EVALUATION, TEACHER = "evaluation", "teacher, for the cache"
IDLE, STAGE = "all else in the stage: idle", "the stage"
AROUND, PROCESS = "around it: start and end, imports, data, doctor", "the process"
WORK = {
    FORWARD: [(DistillationTrainer, "training_step")],
    STEP: [(Accelerator, "clip_grad_norm_"), (AcceleratedOptimizer, "step")],
    EVALUATION: [(DistillationTrainer, "evaluate")],
    TEACHER: [(inference, "forward_with_features")],
}


class Stopwatch:
    """Seconds by name of what runs inside the stage."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys([*WORK, STAGE], 0.0)
        self._depth = 0
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time counts where the stage runs it and no other piece does."""

        @wraps(function)
        def timed(*arguments: Any, **settings: Any) -> Any:
            # 1 in the stage, 2 in a piece of it.
            if self._depth != (0 if name == STAGE else 1):
                return function(*arguments, **settings)
            with self._counted(name):
                return function(*arguments, **settings)

        return timed

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        wait_for(self._device)
        self._depth += 1
        start = time.perf_counter()
        try:
            yield
        finally:
            wait_for(self._device)
            self.seconds[name] += time.perf_counter() - start
            self._depth -= 1


def pieces_of(arguments: Sequence[str]) -> dict[str, float]:
    """Runs `distill-nlp` with these arguments, which train students, and gives the seconds of their stages' pieces.

    Args:
        arguments: of the command.

    Raises:
        SystemExit: the command failed, or trained no student.
    """
    watch = Stopwatch()
    with ExitStack() as patches:
        for name, places in {**WORK, STAGE: [(StudentStages, "student")]}.items():
            for owner, attribute in places:
                wrapper = watch.around(name, getattr(owner, attribute))
                patches.enter_context(mock.patch.object(owner, attribute, wrapper))
        code = cli.main(arguments)
    if code or not watch.seconds[FORWARD]:
        raise SystemExit(f"no idle share: distill-nlp {arguments[0]} ended with code {code} or trained no student")
    return watch.seconds


def figures(seconds: dict[str, float], whole: float) -> dict[str, Figures]:
    """The pieces of the stage, what is left of it, and what the process does besides.

    Args:
        seconds: as of `pieces_of`.
        whole: of the process, from its start to its end.
    """
    stage = seconds[STAGE]
    pieces = {name: seconds[name] for name in WORK}
    pieces |= {IDLE: stage - sum(pieces.values()), STAGE: stage, AROUND: whole - stage, PROCESS: whole}
    found: dict[str, Figures] = {}
    for name, value in pieces.items():
        of_stage = {} if name in (AROUND, PROCESS) else {"share": value / stage}
        found[name] = {"seconds": value, "share_of_process": value / whole} | of_stage
    return found


if __name__ == "__main__":
    write_json(sys.argv[1], pieces_of(sys.argv[2:]))
