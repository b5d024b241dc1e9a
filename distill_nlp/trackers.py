"""Experiment trackers: whether they are there, and one run of a tracker for each training."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from distill_nlp.config_checks import did_you_mean

logger = logging.getLogger(__name__)

_PACKAGES = {"comet_ml": "comet-ml"}
# Transformers does not always say whether these are there.
_UNKNOWN = {"azure_ml", "flyte"}
LONGEST_RUN_NAME = 128
"""Characters, of W&B."""


def check_trackers(report_to: str | Sequence[str]) -> None:
    """Refuses trackers that are not known or not installed.

    Raises:
        ValueError: there is no such tracker.
        ImportError: its package is not installed.
    """
    names = [report_to] if isinstance(report_to, str) else report_to
    wanted = [name for name in names if name not in ("none", "all")]
    for name in wanted:
        if name not in INTEGRATION_TO_CALLBACK:
            known = list(INTEGRATION_TO_CALLBACK)
            raise ValueError(f"report_to: no tracker {name}; there are {', '.join(known)}{did_you_mean(name, known)}")
    for name in sorted(set(wanted) - set(get_available_reporting_integrations()) - _UNKNOWN):
        raise ImportError(f"report_to: {name} is not installed; pip install {_PACKAGES.get(name, name)}")


def run_name(given: str | None, folder: Path) -> str:
    """What trackers call a training: so that no two that are started from one place are one.

    Args:
        given: by the user, for all trainings of an experiment.
        folder: of the training's result.
    """
    folder = folder.absolute()
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    # The end tells one from another.
    return (f"{shown}" if given is None else f"{given}: {shown}")[-LONGEST_RUN_NAME:]


@contextmanager
def run_of_its_own(callbacks: Sequence[TrainerCallback], writes: bool) -> Iterator[None]:
    """Ends the runs of W&B and trackio that begin inside, which the next training would go on with.

    One that was open before is the caller's, and stays.

    Args:
        callbacks: of a Trainer.
        writes: whether this process is the one that reports.
    """
    own = [callback for callback in callbacks if type(callback).__name__ in _OPEN and not _is_open(callback)]
    ended_well = False
    try:
        yield
        ended_well = True
    finally:
        for callback in own:
            if writes and _is_open(callback):
                try:
                    _finish(callback, ended_well)
                except Exception as error:
                    # The training is what counts.
                    logger.warning("%s could not end its run: %s", type(callback).__name__, error)
                callback._initialized = False


_OPEN = {
    "WandbCallback": lambda callback: callback._wandb.run,
    "TrackioCallback": lambda callback: callback._trackio.context_vars.current_run.get(),
}


def _is_open(callback: Any) -> bool:
    return _OPEN[type(callback).__name__](callback) is not None


def _finish(callback: Any, ended_well: bool) -> None:
    if type(callback).__name__ == "WandbCallback":
        callback._wandb.finish(exit_code=0 if ended_well else 1)
    else:
        callback._trackio.finish()
