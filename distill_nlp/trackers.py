"""Experiment trackers: whether they are there, and one run of a tracker for each training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from distill_nlp.config_checks import did_you_mean

# Callbacks that leave a run open at the end of a training, which the next one would go on with; and their client.
_CLIENTS = {"WandbCallback": "_wandb", "TrackioCallback": "_trackio"}
_PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml", "codecarbon": "codecarbon"}


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
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise ValueError(
                f"report_to: no tracker {name}; there are {known}{did_you_mean(name, [*INTEGRATION_TO_CALLBACK])}"
            )
    for name in sorted(set(wanted) - set(get_available_reporting_integrations())):
        raise ImportError(f"report_to: {name} is not installed; pip install {_PACKAGES.get(name, name)}")


def run_name(given: str | None, stage: str, folder: Path) -> str:
    """What trackers call a training: so that no two of a machine are one.

    Args:
        given: by the user, for all trainings of an experiment.
        stage: of the experiment.
        folder: of its result.
    """
    if given is not None:
        return f"{given}, {stage}"
    folder = folder.absolute()
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)


@contextmanager
def run_of_its_own(callbacks: Sequence[TrainerCallback], writes: bool) -> Iterator[None]:
    """Ends the trackers' runs that begin inside; one that was open before is the caller's, and stays.

    Args:
        callbacks: of a Trainer.
        writes: whether this process is the one that reports.
    """
    clients = [(one, getattr(one, _CLIENTS[type(one).__name__])) for one in callbacks if type(one).__name__ in _CLIENTS]
    own = [(callback, client) for callback, client in clients if getattr(client, "run", None) is None]
    try:
        yield
    finally:
        for callback, client in own:
            if writes and callback._initialized:
                client.finish()
                callback._initialized = False
