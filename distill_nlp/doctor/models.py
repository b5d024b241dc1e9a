"""Whether the two models and the losses fit: layers, widths, attention, what each loss reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from distill_nlp.capture import enable_attention_capture
from distill_nlp.doctor.findings import Finding
from distill_nlp.layer_mapping import format_pairs
from distill_nlp.losses.base import ModelShape
from distill_nlp.losses.projections import Projections
from distill_nlp.objective import DistillationObjective
from distill_nlp.student import attention_dropout_name


def check_layers(objective: DistillationObjective) -> Finding:
    """The mapped pairs of a bound objective, and its projections with their parameters."""
    projections = []
    for name, loss in objective.losses.items():
        for module in loss.modules():
            if isinstance(module, Projections) and len(module):
                numbers = sum(p.numel() for p in module.parameters())
                kind = module.kind if module.kind != "auto" else "linear"
                widths = " → ".join(map(str, module.widths))
                projections.append(f"{name}: {len(module)} {kind} {widths}, {numbers:,} parameters")
    learned = "; projections " + "; ".join(projections) if projections else "; no projections"
    return Finding("ok", "layers", objective.formula() + learned)


def check_sizes(student: ModelShape, teacher: ModelShape, student_size: int, teacher_size: int) -> Finding:
    """Whether the student is the smaller one.

    Args:
        student_size, teacher_size: numbers of parameters.

    Returns:
        A warning where the student has more layers, wider states or as many parameters as the teacher, else ok.
    """
    what = f"student {_described(student, student_size)}; teacher {_described(teacher, teacher_size)}"
    larger = [
        word
        for word, name in (("deeper", "num_layers"), ("wider", "hidden_size"))
        if (getattr(student, name) or 0) > (getattr(teacher, name) or float("inf"))
    ]
    if student_size >= teacher_size:
        larger.append("not smaller")
    if not larger:
        return Finding("ok", "sizes", f"{what}: {student_size / teacher_size:.0%} of its parameters")
    return Finding(
        "warning",
        "sizes",
        f"{what}: the student is {' and '.join(larger)}",
        "such a student is no cheaper to serve where it is larger",
        "fewer layers by --student.from_teacher.layers or --student.config, or a smaller --student.model",
    )


def _described(shape: ModelShape, size: int) -> str:
    parts = [f"{size / 1e6:.1f}M parameters"]
    if shape.num_layers is not None:
        parts.append(f"{shape.num_layers} layers")
    if shape.hidden_size is not None:
        parts.append(f"width {shape.hidden_size}")
    return ", ".join(parts)


def check_attention(models: Mapping[str, nn.Module], reading: Sequence[str]) -> Finding:
    """Whether queries and keys can be captured where losses read them, and which attention runs.

    Args:
        models: "student" and "teacher"; put on the capturing attention here, so not the ones to be trained. They may
            lie on the meta device.
        reading: names of the losses that read attention.

    Returns:
        A stop where a model's attention cannot be captured, else ok.
    """
    kinds = ", ".join(f"{name} {_implementation(model)}" for name, model in models.items())
    if not reading:
        return Finding("ok", "attention", f"{kinds}; no loss reads it")
    for name, model in models.items():
        try:
            enable_attention_capture(model)
        except ValueError as error:
            return Finding(
                "stop",
                "attention",
                f"losses {', '.join(reading)} read attention, and the {name} does not give it: {error}",
                "the first step would end the run",
                " ".join(f"--losses.{loss}.weight 0" for loss in reading) + " --losses.hidden.weight 1",
            )
    return Finding("ok", "attention", f"{kinds}; captured for {', '.join(reading)}, with the models on fused attention")


def _implementation(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_attn_implementation", None) or "of its own")


def check_attention_dropout(config: Any, role: str, device: str, settings: Any = None) -> Finding:
    """Whether attention dropout keeps the CPU from its fast attention.

    Args:
        config: of a model that is trained.
        role: "student" or "teacher".
        device: type of the device, "cpu" or "cuda".
        settings: of the student, with `overrides` and `config`, one of which may set the rate.
    """
    name = attention_dropout_name(config)
    rate = config.to_dict()[name] if name else 0.0
    check = f"{role} dropout"
    if device != "cpu" or not rate:
        return Finding("ok", check, f"attention dropout {rate:g} on {device}: the fast path")
    return Finding(
        "warning",
        check,
        f"attention dropout {rate:g} on the CPU",
        "PyTorch then takes its slow path, which also keeps the maps: forward and backward took 1.25 times as long at "
        "128 tokens and 1.57 times at 512",
        f"--{_setting_of_dropout(settings, name)} 0" if role == "student" else f"--{role}.overrides.{name} 0.0",
    )


def _setting_of_dropout(settings: Any, name: str) -> str:
    """What sets a student's attention dropout: the rate must not stand in two places."""
    places = [place for place in ("overrides", "config") if name in (getattr(settings, place, None) or {})]
    return f"student.{places[0]}.{name}" if places else "student.attention_dropout"


def check_losses(
    objective: DistillationObjective, problem_type: str, live_because: str | None, has_unlabeled: bool = False
) -> list[Finding]:
    """What each loss reads, and whether the teacher's answers come from the cache.

    Args:
        objective: a bound one.
        problem_type: the kind of task.
        live_because: why the teacher runs in every step, None with a cache.
        has_unlabeled: whether rows without labels are among the student's.

    Returns:
        A stop for losses that are not defined for the task, a warning where nothing is learned from the teacher or all
        rows without labels would be idle; else ok. Then one about the cache.
    """
    refused = [name for name, loss in objective.losses.items() if problem_type not in loss.tasks]
    what = "; ".join(f"{name} reads {_reads(loss)}" for name, loss in objective.losses.items())
    if refused:
        return [
            Finding(
                "stop",
                "losses",
                f"{', '.join(refused)} is not defined for {problem_type}",
                "the trainer refuses it",
                " ".join(f"--losses.{name}.weight 0" for name in refused),
            )
        ]
    if not objective.needs_teacher:
        idle = ", and rows without labels teach nothing" if has_unlabeled else ""
        return [
            Finding(
                "warning",
                "losses",
                f"{what}: no loss reads the teacher",
                f"the student is trained as the baseline is: nothing is distilled{idle}",
                "--losses.kl.weight 0.7",
            )
        ]
    cache = (
        "its answers are cached, it runs once per row"
        if live_because is None
        else f"it runs in every step: {live_because}"
    )
    return [Finding("ok", "losses", what), Finding("ok", "teacher cache", cache)]


def _reads(loss: Any) -> str:
    """What a bound loss looks at."""
    if loss.hidden_state_pairs:
        pooled = {"first": "first-token states", "mean": "mean states"}.get(
            getattr(loss, "pooling", None), "hidden states"
        )
        return f"{pooled} {format_pairs(loss.hidden_state_pairs)}"
    if loss.attention_pairs:
        return f"queries, keys, values {format_pairs(loss.attention_pairs)}"
    parts = ["logits"] if loss.needs_teacher else []
    if loss.unit == "labeled_rows":
        parts.append("labels")
    return " and ".join(parts) or "the student's logits"
