"""Settings that `data.streaming` needs, changes, or does not go with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from distill_nlp.config_training import TrainingSection

if TYPE_CHECKING:
    from distill_nlp.config import Experiment

STRATEGIES = ("group_by_length", "random", "sequential")
EVALUATIONS = 10
"""In a training, where neither eval_strategy nor eval_steps is given."""


def streamed_training(section: TrainingSection, steps: int | None = None) -> TrainingSection:
    """The settings with evaluations by steps: an epoch of a stream has no known end.

    Args:
        section: of one training.
        steps: that it takes, where not `max_steps`.
    """
    if "eval_strategy" in section.model_fields_set:
        return section
    every = section.eval_steps or max(1, math.ceil((steps or section.max_steps) / EVALUATIONS))
    return section.model_copy(update={"eval_strategy": "steps", "eval_steps": every})


def check_streaming(experiment: Experiment, synthetic: str, train_tokenizer: str) -> None:
    """Refuses what cannot be done without all rows at hand.

    Args:
        experiment: with `data.streaming`.
        synthetic, train_tokenizer: the values of `data.dataset` and `data.tokenizer` that are no names of files.

    Raises:
        ValueError: with the setting and what to do.
    """
    data = experiment.data
    if data.dataset == synthetic:
        raise ValueError("data.streaming: the synthetic set is made in memory; name files, or leave data.streaming out")
    if data.validation_split is None:
        raise ValueError(
            "data.streaming needs data.validation_split: no rows can be carved from a stream, whose number is not known"
        )
    if data.tokenizer == train_tokenizer:
        raise ValueError(
            f"data.tokenizer {train_tokenizer} needs all texts, which data.streaming does not hold; name a tokenizer, "
            "such as one that was trained on a part of them"
        )
    cached = {"data.unlabeled_min_confidence": data.unlabeled_min_confidence, "data.pseudo_labels": data.pseudo_labels}
    if given := [name for name, value in cached.items() if value]:
        raise ValueError(
            f"{', '.join(given)}: needs the teacher's cached answers, and those for rows of a stream are not cached; "
            "leave it out, or data.streaming"
        )
    if any(_is_balanced(losses) for losses in (experiment.losses, *(phase.losses for phase in experiment.phases))):
        raise ValueError(
            "losses.ce.class_weights: balanced counts the labels of all rows, which data.streaming does not; write the "
            "weights as a list"
        )
    for name, section in _trainings(experiment).items():
        _check_training(name, section)
    if data.unlabeled is not None:
        for name, section in _trainings(experiment).items():
            if section.unlabeled_ratio is None and not name.startswith("teacher."):
                raise ValueError(
                    f"{name}.unlabeled_ratio is needed with data.streaming and data.unlabeled: two streams are mixed "
                    "by a ratio, such as 0.5"
                )


def _is_balanced(losses: dict[str, Any] | None) -> bool:
    return any(section.arguments().get("class_weights") == "balanced" for section in (losses or {}).values())


def _trainings(experiment: Experiment) -> dict[str, TrainingSection]:
    """Name -> each training that may take place."""
    students = experiment.student_trainings()
    names = [f"phases.{i}.training" for i in range(len(experiment.phases))] or ["training"]
    found = {name: streamed_training(own.training) for name, own in zip(names, students, strict=True)}
    if any(member.finetune != "never" for member in experiment.teacher.members()):
        found["teacher.training"] = experiment.teacher_training()
    return found


def _check_training(name: str, section: TrainingSection) -> None:
    if section.max_steps < 1:
        raise ValueError(f"{name}.max_steps is needed with data.streaming: the number of rows is not known")
    if section.eval_strategy == "epoch":
        raise ValueError(
            f"{name}.eval_strategy: an epoch of a stream has no known end; set steps, with eval_steps, or no"
        )
    if section.train_sampling_strategy not in STRATEGIES:
        raise ValueError(
            f"{name}.train_sampling_strategy {section.train_sampling_strategy} needs all rows; with data.streaming "
            f"there are {', '.join(STRATEGIES)}"
        )
