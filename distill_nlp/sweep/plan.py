"""What to try: the settings of a sweep, read from YAML and checked together with the experiment that they change."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    StrictFloat,
    StrictInt,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from distill_nlp.config import Experiment, Section, did_you_mean
from distill_nlp.config_file import load_experiment, read_settings
from distill_nlp.config_training import METRICS, TrainingSection, task_metric
from distill_nlp.data import read_problem_type
from distill_nlp.data_streams import streamed_problem_type
from distill_nlp.errors import UsageError

_MANAGED = {
    "output_dir": "each trial has a folder of its own in the sweep's output_dir",
    "cache_dir": "the teacher is computed once for all trials",
    "seeds": "trials run the experiment's first seed",
    "data.test_split": "no trial reads it",
    "report": "trials write no report",
}


# A truth value or a text is no number.
Number = StrictInt | StrictFloat


class Range(Section):
    """Numbers from `low` to `high`, both included."""

    low: Number = Field(description="smallest value")
    high: Number = Field(description="largest value")
    log: bool = Field(False, strict=True, description="even on a logarithmic scale")
    step: Number | None = Field(None, description="only low, low + step, ...")

    @model_validator(mode="after")
    def _is_a_range(self) -> Range:
        if self.low > self.high:
            raise ValueError(f"low must be <= high, got {self.low} > {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low must be > 0 with log, got {self.low}")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"step must be > 0, got {self.step}")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other")
        return self


Choices = Annotated[list[Any], Field(min_length=1)]
Dimension = Annotated[
    Annotated[Range, Tag("range")] | Annotated[Choices, Tag("choices")],
    Discriminator(lambda value: "choices" if isinstance(value, list | tuple) else "range"),
]


class Sweep(Section):
    """Which settings of an experiment to try, how often, and what counts."""

    experiment: str = Field(description="the experiment's YAML; a relative path starts at the folder of the sweep's")
    output_dir: str = Field(description="folder of teacher, trials and tables; the same folder goes on")
    overrides: dict[str, Any] = Field({}, description="settings of the experiment for all trials, by dotted name")
    space: dict[str, Dimension] = Field(
        min_length=1, description="dotted name -> {low, high, log, step} or a list of values"
    )
    trials: int = Field(20, ge=1, description="finished trials to end with, pruned and failed ones among them")
    seed: int = Field(0, ge=0, lt=2**32, description="of the sampler; the students have the experiment's")
    metric: str | None = Field(
        None, description=f"validation metric to maximise ({', '.join(METRICS)}); the experiment's own if not given"
    )
    pruner: Literal["none", "median", "hyperband"] = Field("median", description="what stops a trial that lags behind")
    sampler: Literal["tpe", "random", "grid"] = Field("tpe", description="what picks the next settings")

    @field_validator("metric")
    @classmethod
    def _is_maximised(cls, metric: str | None) -> str | None:
        if metric is not None and metric not in METRICS:
            raise ValueError(f"must be one of {', '.join(METRICS)}, which are maximised, got {metric!r}")
        return metric

    @model_validator(mode="after")
    def _names_are_free(self) -> Sweep:
        for name in self.space:
            for managed, reason in _MANAGED.items():
                if _overlap(name, managed):
                    raise ValueError(f"space.{name}: cannot be swept: {reason}")
            others = [other for other in (*self.space, *self.overrides) if other != name and _overlap(name, other)]
            if others:
                raise ValueError(f"space.{name}: is set by {others[0]} too")
            if name in self.overrides:
                raise ValueError(f"space.{name}: stands in overrides too")
        return self


@dataclass(frozen=True)
class SweepPlan:
    """A sweep with the files that it was read from.

    Args:
        sweep: its settings.
        path: of its YAML.
        config: the experiment's YAML.
    """

    sweep: Sweep
    path: Path
    config: Path

    @property
    def root(self) -> Path:
        """The folder of all that the sweep makes."""
        return Path(self.sweep.output_dir).expanduser()

    def changes(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What a trial's settings change in the experiment's YAML, by dotted name.

        What is tried of `training` is the student's: the teacher keeps what the experiment has without the trial, or
        each trial would have to train one, and would compare teachers and students at once.
        """
        changes = {**self.sweep.overrides, **settings}
        return changes | self._of_the_teacher(changes)

    @cached_property
    def _teacher_training(self) -> TrainingSection | None:
        """How the teacher is trained without any trial's settings; None where the experiment needs those."""
        try:
            return load_experiment(
                self.config, self.sweep.overrides | {"output_dir": str(self.root)}
            ).teacher_training()
        except UsageError:
            return None

    def _of_the_teacher(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of the teacher's training that give back what `changes` take from it."""
        swept = [name for name in self.sweep.space if _overlap(name, "training")]
        if not swept or self._teacher_training is None:
            return {}
        own = self._teacher_training
        found = load_experiment(self.config, dict(changes) | {"output_dir": str(self.root)}).teacher_training()
        before, after = own.model_dump(), found.model_dump()
        names = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        if own.auto_batch_size and names & {"auto_batch_size", "per_device_train_batch_size"}:
            before["per_device_train_batch_size"] = "auto"
            names.add("per_device_train_batch_size")
        # The precision that is measured cannot be named beside another one.
        names -= {"auto_batch_size"} | ({"bf16", "fp16"} - own.model_fields_set)
        kept = {f"teacher.training.{name}": before[name] for name in sorted(names & before.keys())}
        return {name: value for name, value in kept.items() if not any(_overlap(name, s) for s in self.sweep.space)}

    def experiment(self, settings: Mapping[str, Any], output_dir: Path, cache_dir: Path | None = None) -> Experiment:
        """The experiment of a trial: its settings over the base, one seed, and no test rows.

        Args:
            settings: dotted name -> value.
            output_dir: of its stages.
            cache_dir: of the teacher's answers, where the experiment does not name one; else in output_dir.

        Raises:
            UsageError: they are no valid experiment.
        """
        try:
            whole = load_experiment(self.config, self.changes(settings) | {"output_dir": str(output_dir)})
        except UsageError as error:
            raise UsageError(f"{self.path}: {error}") from None
        data = whole.data
        if data.validation_split is None and whole.teacher.train_split not in (None, data.train_split):
            raise UsageError(
                f"{self.path}: a sweep with teacher.train_split needs data.validation_split, as it reads no test rows"
            )
        # Each stage loads a test split, and drops rows that stand in it; here it is one that is read anyway.
        stand_in = data.model_copy(update={"test_split": data.validation_split or data.train_split})
        cache = whole.cache_dir or (None if cache_dir is None else str(cache_dir))
        return whole.model_copy(update={"data": stand_in, "seeds": whole.seeds[:1], "cache_dir": cache})

    def metric(self, experiment: Experiment) -> str:
        """The validation metric that is maximised; where neither file names one, by the labels of the data.

        Raises:
            UsageError: the labels are needed for that, and cannot be read.
        """
        own = experiment.training.metric_for_best_model
        kind_of = streamed_problem_type if experiment.data.streaming else read_problem_type
        return self.sweep.metric or (own if own in METRICS else task_metric(kind_of(experiment.data)))


def load_sweep(
    path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    output_dir: str | None = None,
    trials: int | None = None,
) -> SweepPlan:
    """Reads a sweep from YAML and checks its settings; the experiment is checked when the first point is known.

    Args:
        path: of the YAML file.
        overrides: settings of the experiment by dotted name, over those of the file.
        output_dir, trials: instead of the file's.

    Raises:
        UsageError: no such file, no YAML, or settings that are wrong, on one line with their path.

    Example:
        >>> plan = load_sweep("configs/sweeps/kl.yaml", {"data.dataset": "data/reviews"}, trials=5)
        >>> plan.sweep.trials
        5
    """
    path = Path(path)
    settings = read_settings(path, "sweep")
    given = {"output_dir": output_dir, "trials": trials}
    settings |= {name: value for name, value in given.items() if value is not None}
    if overrides:
        settings["overrides"] = {**(settings.get("overrides") or {}), **overrides}
    try:
        sweep = Sweep.model_validate(settings)
    except ValidationError as error:
        raise UsageError(f"{path}: {'; '.join(_explain(e) for e in error.errors())}") from None
    config = path.parent / Path(sweep.experiment).expanduser()
    return SweepPlan(sweep, path, Path(os.path.normpath(config)))


def _overlap(one: str, other: str) -> bool:
    """Whether two dotted names are one, or one is a block that holds the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _explain(error: Any) -> str:
    """A pydantic error in one clause: the path, what was expected, what came."""
    # The tag of a dimension, and the members of a union of numbers, are no part of the path that the user wrote.
    parts = [str(part) for part in error["loc"]]
    shown = [part for i, part in enumerate(parts) if not (i >= 2 and part in ("range", "choices", "int", "float"))]
    path, message = ".".join(shown), error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        known = Range.model_fields if parts[0] == "space" else Sweep.model_fields
        return f"{path}: unknown setting{did_you_mean(parts[-1], known)}"
    if error["type"] == "missing":
        return f"{path}: is needed"
    if error["type"] == "value_error":
        return f"{path}: {message}" if path else message
    if error["type"] == "model_type" or (error["type"] == "model_attributes_type"):
        return f"{path}: must be {{low: ..., high: ...}} or a list of values, got {error['input']!r}"
    return f"{path}: {message[0].lower()}{message[1:]}, got {error['input']!r}"
