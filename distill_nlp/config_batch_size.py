"""Settings that a batch size which is found does not go with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill_nlp.config import Experiment

_NAME = "training.per_device_train_batch_size"


def check_auto_batch_size(experiment: Experiment) -> None:
    """Refuses `auto` where a step would learn something else if it were cut into other forward passes.

    Args:
        experiment: whose losses can be built.

    Raises:
        ValueError: with the setting and what to do.
    """
    if own := [i for i, phase in enumerate(experiment.phases) if phase.training.auto_batch_size]:
        raise ValueError(f"phases.{own[0]}.{_NAME}: auto is for all phases: set it in training")
    for seen in experiment.student_trainings():
        if not seen.training.auto_batch_size:
            continue
        used = {name: section.arguments() for name, section in seen.losses.items() if section.weight != 0}
        if comparing := [name for name, arguments in used.items() if _compares_rows(name, arguments)]:
            raise ValueError(
                f"{_NAME}: auto decides how many rows a forward pass has, and losses.{comparing[0]} compares the rows "
                "of one with each other; give the number"
            )
        if seen.training.unlabeled_ratio is not None:
            raise ValueError(
                f"{_NAME}: auto decides how many rows a forward pass has, and unlabeled_ratio mixes the rows of one; "
                "give the number"
            )


def _compares_rows(name: str, arguments: dict[str, object]) -> bool:
    from distill_nlp.losses import LOSSES

    return LOSSES[name](**arguments).compares_rows
