"""The model card: metadata that the Hub reads, and a page that says what the student is and what it was measured at."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

RECIPE = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "warmup_steps",
    "lr_scheduler_type",
    "bf16",
    "fp16",
)
"""Settings of a training that a card names."""
_NO_REPORT = (
    "There is no report beside this student, so nothing is claimed here: no accuracy, no comparison with the teacher, "
    "no speed."
)


@dataclass
class Score:
    """A measured value of this student, with its 95% interval where there is one."""

    metric: str
    value: float
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Phase:
    """One of several trainings of a student, one after the other: its losses as a formula, setting -> value."""

    objective: str | None
    recipe: Mapping[str, Any]


@dataclass
class CardFacts:
    """What is known of a student; what is not known is left out of the card, not guessed.

    Args:
        name: of the model.
        labels: names of its classes, by index.
        several_labels: a text may have several of them.
        repo_id: on the Hub.
        loads_by_auto_classes: it is a Transformers model with its config.
        library: that loads it.
        base_model: id on the Hub of what the student started from.
        teacher: what taught it, as one may say it in public.
        dataset: id on the Hub of its examples.
        dataset_name: how to name these where they are not on the Hub.
        dataset_config: configuration of a data set on the Hub.
        test_split: that the scores were measured on.
        languages, license: as the user gave them.
        objective: the losses as a formula.
        recipe: setting -> value.
        earlier_phases: trainings before the one that `objective` and `recipe` tell of.
        parameters, size_mb: of the student.
        max_length: in tokens, that it was trained on.
        scores: of this student on the test rows.
        test_rows: number of them.
        comparison: rows of the report's table, the names of the columns first.
        summary: sentences under it.
        speed_note: how speed was measured.
        no_report: why there are no figures.
        validation: figures of the last evaluation in training.
        limits: sentences.
        versions: package -> version.
        command, settings: what made it, the settings as YAML.
        onnx_folders: where exports for ONNX Runtime lie in the repository.
    """

    name: str
    labels: Sequence[str] = ()
    several_labels: bool = False
    repo_id: str | None = None
    loads_by_auto_classes: bool = True
    library: str = "transformers"
    base_model: str | None = None
    teacher: str | None = None
    dataset: str | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    test_split: str | None = None
    languages: Sequence[str] = ()
    license: str | None = None
    objective: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    earlier_phases: Sequence[Phase] = ()
    parameters: int | None = None
    size_mb: float | None = None
    max_length: int | None = None
    scores: Sequence[Score] = ()
    test_rows: int | None = None
    comparison: Sequence[Sequence[str]] = ()
    summary: Sequence[str] = ()
    speed_note: str | None = None
    no_report: str | None = None
    validation: Mapping[str, float] = field(default_factory=dict)
    limits: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None
    settings: str | None = None
    onnx_folders: Sequence[str] = ()


def model_card(facts: CardFacts) -> str:
    """The text of README.md: YAML metadata, then Markdown.

    Raises:
        ValueError: the metadata would not be read back as it was written.

    Example:
        >>> card = ModelCard(model_card(CardFacts("tiny-student", labels=["bad", "good"])))
        >>> card.data.pipeline_tag
        'text-classification'
    """
    data = _metadata(facts)
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(_body(facts))
    # What the Hub's own validation needs a network for; the structure is checked with the library that writes it.
    if ModelCard(text).data.to_dict() != data.to_dict():
        raise ValueError("the metadata of the model card cannot be read back as written; give other names")
    return text


def _metadata(facts: CardFacts) -> ModelCardData:
    rounded = [Score(s.metric, s.value, _one_line_values(s.details)) for s in facts.scores]
    results = [
        EvalResult(
            task_type="text-classification",
            task_name="Text classification",
            # The Hub wants an id here; what is not on the Hub has none.
            dataset_type=facts.dataset or "custom",
            dataset_name=one_line(facts.dataset or facts.dataset_name or "not named"),
            dataset_config=one_line(facts.dataset_config) if facts.dataset_config else None,
            dataset_split=one_line(facts.test_split) if facts.test_split else None,
            metric_type={"f1_macro": "f1", "f1_micro": "f1"}.get(score.metric, score.metric),
            metric_name=score.metric,
            metric_value=score.value,
            metric_args=score.details or None,
        )
        for score in rounded
    ]
    return ModelCardData(
        language=[one_line(language) for language in facts.languages] or None,
        license=one_line(facts.license) if facts.license else None,
        base_model=facts.base_model,
        datasets=[facts.dataset] if facts.dataset else None,
        library_name=facts.library,
        pipeline_tag="text-classification",
        tags=["knowledge-distillation", "distill_nlp"],
        # The library builds `model-index` of these two.
        model_name=one_line(facts.name) if results else None,
        eval_results=results or None,
    )


def _one_line_values(details: Mapping[str, Any]) -> dict[str, Any]:
    return {key: one_line(value) if isinstance(value, str) else value for key, value in details.items()}


def _body(facts: CardFacts) -> list[str]:
    kind = "each of which may apply or not" if facts.several_labels else "of which one applies"
    lines = [f"# {markdown(facts.name)}", ""]
    what = "A text classifier"
    if facts.labels:
        what += f" with {len(facts.labels)} labels, {kind}: {', '.join(markdown(label) for label in facts.labels)}"
    made = f", distilled from {markdown(facts.teacher)}" if facts.teacher else ", distilled from a larger model"
    lines += [f"{what}{made} with distill_nlp.", ""]
    lines += ["## How to use", "", *_usage(facts), ""]
    lines += ["## How good it is", "", *_results(facts), ""]
    lines += ["## How it was made", "", *_making(facts), ""]
    lines += ["## Limits", "", *(f"- {limit}" for limit in _limits(facts)), ""]
    if facts.versions:
        shown = ", ".join(f"{markdown(k)} {markdown(v)}" for k, v in facts.versions.items())
        lines += ["## Versions", "", f"{shown}.", ""]
    return lines


def _usage(facts: CardFacts) -> list[str]:
    repo = facts.repo_id or "PATH"
    if not facts.loads_by_auto_classes:
        code = [
            "from huggingface_hub import hf_hub_download",
            "from safetensors.torch import load_file",
            "",
            f'weights = load_file(hf_hub_download("{repo}", "model.safetensors"))',
            "# the model's class is not part of this repository: load_state_dict(weights) into yours",
        ]
        return ["```python", *code, "```"]
    several = ", top_k=None" if facts.several_labels else ""
    code = [
        "from transformers import pipeline",
        "",
        f'classifier = pipeline("text-classification", model="{repo}")',
        f'classifier("a text"{several}, truncation=True)',
    ]
    lines = ["```python", *code, "```"]
    if facts.several_labels:
        lines += ["", "A label applies where its score is above 0.5."]
    if facts.onnx_folders:
        lines += [
            "",
            f"Exports for ONNX Runtime, with their tokenizer: {', '.join(map(markdown, facts.onnx_folders))}.",
        ]
    return lines


def _results(facts: CardFacts) -> list[str]:
    if not facts.comparison:
        lines = [markdown(facts.no_report) if facts.no_report else _NO_REPORT]
        if facts.validation:
            shown = ", ".join(f"{markdown(k)} {v:.4f}" for k, v in facts.validation.items())
            lines += ["", f"The last evaluation in training gave on its validation rows: {shown}."]
        return lines
    own = [f"{score.metric} {score.value:.4f}" for score in facts.scores]
    lines = [f"This student on {facts.test_rows:,} test rows: {', '.join(map(markdown, own))}.", ""]
    lines += [
        "Teacher, the same student plainly fine-tuned (baseline), and the distilled student, on the same rows; "
        "± is the standard deviation over seeds, intervals are over rows and, by Student's t, seeds:",
        "",
    ]
    header, *rows = facts.comparison
    lines += ["| " + " | ".join(map(markdown, header)) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(map(markdown, row)) + " |" for row in rows]
    lines += ["", *(f"- {markdown(line)}" for line in facts.summary)]
    return lines + (["", markdown(facts.speed_note)] if facts.speed_note else [])


def _making(facts: CardFacts) -> list[str]:
    dataset = facts.dataset or facts.dataset_name
    lines = [f"- Teacher: {markdown(facts.teacher)}"] if facts.teacher else []
    if facts.base_model:
        lines.append(f"- Started from: {markdown(facts.base_model)}")
    if dataset:
        lines.append(f"- Examples: {markdown(dataset)}" + ("" if facts.dataset else ", not on the Hub"))
    phases = [*facts.earlier_phases, Phase(facts.objective, facts.recipe)]
    titles = [f"phase {i}" for i in range(1, len(phases) + 1)] if facts.earlier_phases else ["value"]
    for title, phase in zip(titles, phases, strict=True):
        if phase.objective:
            of = f", {title}" if facts.earlier_phases else ""
            lines.append(f"- Loss{of}: {markdown(phase.objective)}")
    if facts.parameters:
        size = f", {facts.size_mb:.1f} MB" if facts.size_mb else ""
        lines.append(f"- Size: {facts.parameters / 1e6:.2f}M parameters{size}")
    if settings := dict.fromkeys(name for phase in phases for name in phase.recipe):
        lines += ["", f"| setting | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
        for name in settings:
            values = [markdown(phase.recipe.get(name, "–")) for phase in phases]
            lines.append(f"| {markdown(name)} | {' | '.join(values)} |")
    if facts.command:
        lines += ["", "Made by", "", *fenced(facts.command)]
    if facts.settings:
        lines += ["", "with the settings", "", *fenced(facts.settings, "yaml")]
    return lines


def _limits(facts: CardFacts) -> list[str]:
    limits = [
        "It answers like its teacher, the teacher's mistakes and biases included; neither was examined for these.",
        "It knows texts like those that it was trained on; nothing is known of others.",
    ]
    if facts.max_length:
        limits.append(f"It was trained on at most {facts.max_length} tokens of a text; the rest is cut off.")
    return limits + [markdown(limit) for limit in facts.limits]


def one_line(text: Any) -> str:
    """Without line breaks and control characters, which could end the block of metadata."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def markdown(text: Any) -> str:
    """A text that stays text in Markdown, tables included: what would be markup is escaped."""
    escaped = re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", html.escape(one_line(text), quote=False))
    # At the start of a line these make a list or a rule.
    return re.sub(r"^(?=[-+])", r"\\", escaped)


def fenced(text: str, language: str = "") -> list[str]:
    """A block of code that no text can close: its fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", text.rstrip("\n"), fence]
