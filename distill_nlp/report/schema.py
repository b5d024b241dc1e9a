"""What report.json holds, as pydantic models; `Report.model_json_schema()` gives the JSON schema."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION = 2
Interval = tuple[float, float] | None


class Part(BaseModel):
    """Names that are not known are mistakes."""

    model_config = ConfigDict(extra="forbid")


class MeanSd(Part):
    """Over seeds; no deviation of a single one."""

    mean: float
    sd: float | None


class ClassScores(Part):
    """One class against all others, counts in rows."""

    support: int
    predicted: int
    hits: int
    precision: float = Field(ge=0, le=1)
    recall: float = Field(ge=0, le=1)
    f1: float = Field(ge=0, le=1)


class Bin(Part):
    """Confidence in (low, high]; `confidence` and `right` are None where `count` is 0."""

    low: float
    high: float
    count: int
    confidence: float | None
    right: float | None


class Scores(Part):
    """One model on the test rows; log-loss and KL in nats."""

    path: str
    accuracy: float
    f1_macro: float
    f1_micro: float | None = Field(None, description="several labels per text")
    mcc: float
    log_loss: float
    ece: float
    per_class: list[ClassScores]
    confusion: list[list[int]] | None = Field(description="[class][named], rows; one label per text")
    reliability: list[Bin]


class OfSeed(Scores):
    """A baseline or student."""

    agreement: float
    kl_to_teacher: float


class Latency(Part):
    """Milliseconds of one row, at its length, without tokenization."""

    p50: float
    p95: float
    p99: float


class Memory(Part):
    """Megabytes (10^6) of one batch of so many of the longest rows, beside the weights; None where not readable."""

    rows: int
    mb: float | None
    how: str | None


class Costs(Part):
    """Of one model, or of all of an ensemble; megabytes are 10^6 bytes, throughput is rows per second."""

    parameters: int
    size_mb: float
    weights_mb: float
    latency_ms: Latency
    throughput: float
    pass_memory: Memory


class Member(Part):
    """One teacher of an ensemble."""

    path: str
    weight: float
    accuracy: float
    f1_macro: float
    f1_micro: float | None = None


class Teacher(Scores, Costs):
    """The teacher, or an ensemble as one."""

    ensemble: list[Member] | None = None
    mean: str | None = None


class Student(Costs):
    """Baseline or student: each seed, and over seeds; costs are those of the first."""

    seeds: dict[str, OfSeed]
    accuracy: MeanSd
    f1_macro: MeanSd
    f1_micro: MeanSd | None = None
    mcc: MeanSd
    log_loss: MeanSd
    ece: MeanSd
    agreement: MeanSd
    kl_to_teacher: MeanSd


class Models(Part):
    """The three that are compared."""

    teacher: Teacher
    baseline: Student
    student: Student


class Compared(Part):
    """A figure with its 95% interval over test rows and seeds; None where it is not defined."""

    value: float | None
    interval: Interval


class Difference(Compared):
    """Student - baseline, and its interval over test rows alone: what it says of these seeds."""

    rows_interval: Interval = None


class Intervals(Part):
    """Of the score that models are compared by."""

    teacher: Interval
    baseline: Interval
    student: Interval


class McNemar(Part):
    """Rows that only one of the two has right, and the exact two-sided p-value."""

    student_only: int
    baseline_only: int
    p_value: float = Field(ge=0, le=1)


class McNemarOfSeeds(Part):
    """By seed."""

    seeds: dict[str, McNemar]


class Comparison(Part):
    """Student against baseline. Intervals stand under the name of the metric."""

    difference: Difference
    retention: Compared
    gap_closed: Compared
    accuracy_intervals: Intervals | None = None
    f1_macro_intervals: Intervals | None = None
    mcnemar: McNemarOfSeeds
    bootstrap_samples: int


class Slice(Part):
    """The score on a part of the test rows, by its length in tokens, or by whether the student reads all of it."""

    by: Literal["length", "truncated"]
    name: str
    rows: int
    teacher: float
    baseline: float
    student: float


class Machine(Part):
    """What costs were measured on."""

    device: str
    name: str
    cores: int | None
    threads: int


class Energy(Part):
    """Joules of the machine's processors and GPUs that could be read, other programs' work included."""

    joules: float
    sources: list[str]


class Stage(Part):
    """A finished training. No energy where the machine has no counter that can be read.

    Of one that was interrupted, seconds and energy are those from the checkpoint `resumed_from` on.
    """

    objective: str
    steps: int
    seconds: float
    energy: Energy | None = None
    resumed_from: str | None = None


class Run(Part):
    """The run that the report is of."""

    dataset: str
    stages: dict[str, Stage]
    versions: dict[str, str]
    fingerprint: dict[str, Any]


class OfExport(Part):
    """A figure of the student in PyTorch, and of its export."""

    student: float
    export: float


class ExportSpeed(Part):
    """Throughput in rows per second, and as so many times that of student and teacher in PyTorch."""

    latency_ms: Latency
    throughput: float
    batch_size: int
    times_student: float
    times_teacher: float | None
    machine: Machine


class Export(Part):
    """An exported student beside its original, on rows of its own."""

    seed: int
    name: str
    numbers: Literal["fp32", "fp16", "int8"]
    source: str
    rows: int
    flips: int = Field(description="rows with another label")
    max_difference: float = Field(description="of two logits")
    metric: Literal["accuracy", "f1_macro"] | None = None
    score: OfExport | None = None
    size_mb: OfExport
    speed: ExportSpeed | None = None


class Report(Part):
    """report.json.

    Example:
        >>> Report.model_validate_json(Path("runs/imdb/report.json").read_text()).comparison.gap_closed.value
        0.38
    """

    schema_version: Literal[2]
    problem_type: Literal["single_label_classification", "multi_label_classification"]
    metric: Literal["accuracy", "f1_macro"]
    test_rows: int
    label_names: list[str]
    models: Models
    comparison: Comparison
    machine: Machine
    slices: list[Slice] | None = None
    exports: list[Export] | None = None
    run: Run | None = None

    @model_validator(mode="after")
    def _has_the_intervals_of_its_metric(self) -> Report:
        if getattr(self.comparison, f"{self.metric}_intervals") is None:
            raise ValueError(f"comparison.{self.metric}_intervals is missing")
        return self
