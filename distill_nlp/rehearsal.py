"""A training in small, to see whether it would go through: its arguments, and a folder that does not stay."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import PartialState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from distill_nlp.arguments import DistillationArguments


def rehearsal(arguments: DistillationArguments, folder: Path) -> DistillationArguments:
    """The same arguments for two steps, with an evaluation and a checkpoint at their end, and no tracker."""
    short = copy.copy(arguments)
    short.output_dir = str(folder)
    short.max_steps = short.eval_steps = short.save_steps = 2
    short.logging_steps = 1
    short.eval_strategy = short.logging_strategy = IntervalStrategy.STEPS
    short.save_strategy = SaveStrategy.STEPS
    short.eval_delay = 0
    short.load_best_model_at_end = True
    short.report_to = []
    return short


@contextmanager
def passing_folder(path: Path, state: PartialState) -> Iterator[None]:
    """A folder that is gone afterwards, with the parents that were made for it; the same for all ranks."""
    new_parents = [parent for parent in path.parents if not parent.exists()]
    state.wait_for_everyone()
    try:
        yield
        state.wait_for_everyone()
    finally:
        if state.is_main_process:
            shutil.rmtree(path, ignore_errors=True)
            for parent in new_parents:
                with suppress(OSError):
                    parent.rmdir()
