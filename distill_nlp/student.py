"""Builds a student: from a checkpoint, from a config, or from the teacher's own layers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from distill_nlp.checkpoint_checks import check_sizes
from distill_nlp.errors import said_in_one_line
from distill_nlp.loading import check_settings, is_classifier, load_classifier, load_config
from distill_nlp.losses.base import ProblemType
from distill_nlp.student_head import order_head
from distill_nlp.student_layers import student_from_teacher

logger = logging.getLogger(__name__)


def label_arguments(label_names: Sequence[str], problem_type: ProblemType | None = None) -> dict[str, Any]:
    """The config arguments for these classes: both directions, always consistent; and the kind of task, if given."""
    arguments = {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: i for i, name in enumerate(label_names)},
    }
    return arguments if problem_type is None else {**arguments, "problem_type": problem_type}


def task_settings(
    label_names: Sequence[str], problem_type: ProblemType | None, overrides: dict[str, Any] | None
) -> dict[str, Any]:
    """`label_arguments` with a config's overrides over them.

    Raises:
        ValueError: the overrides name another kind of task, or labels.
    """
    overrides = overrides or {}
    refuse_labels(overrides, "overrides")
    other = overrides.get("problem_type", problem_type)
    if problem_type is not None and other != problem_type:
        raise ValueError(f"overrides.problem_type is {other}, but the labels are those of {problem_type}: leave it out")
    return {**label_arguments(label_names, problem_type), **overrides}


def refuse_labels(settings: dict[str, Any], where: str) -> None:
    """Classes are those of the data: as settings of a config they would be a second opinion, or half of one.

    Raises:
        ValueError: number or names of the labels are among the settings.
    """
    if given := sorted(settings.keys() & {"num_labels", "id2label", "label2id"}):
        raise ValueError(f"{where}.{given[0]}: the labels are those of the data: leave it out")


# As DistilBERT, BERT and GPT-2 have it.
_ATTENTION_DROPOUT = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")


def build_student(
    label_names: Sequence[str],
    *,
    model: str | None = None,
    config: dict[str, Any] | None = None,
    from_teacher: dict[str, Any] | None = None,
    teacher: PreTrainedModel | None = None,
    overrides: dict[str, Any] | None = None,
    revision: str | None = None,
    problem_type: ProblemType | None = None,
    attention_dropout: float | Literal["auto"] | None = None,
    say: Callable[[str], None] = logger.info,
) -> PreTrainedModel:
    """Builds a student with a head for these classes, in float32; what is drawn at random follows `torch.manual_seed`.

    Args:
        label_names: names of the classes, by index.
        model: a Hub id or a folder with a checkpoint; or
        config: `{"model_type": "distilbert", "dim": 64, ...}` for one from scratch; or
        from_teacher: `{"layers": 3, "select": "uniform", "architecture": "distilbert"}`, see `student_from_teacher`.
        teacher: the model whose layers, and head where it is a classifier for these labels, `from_teacher` takes.
        overrides: settings of the student's config to change, e.g. `{"attention_dropout": 0.0}`.
        revision: of `model` on the Hub.
        problem_type: for the student's config; not given, it is left as it is.
        attention_dropout: for the student's config, under the name that it has there (see
            `attention_dropout_name`); "auto": 0, where there is such a setting and neither `config` nor `overrides`
            have it; not given, it is left as it is.
        say: gets one line of what was made.

    Raises:
        ValueError: not exactly one of the three ways is given, or a setting of theirs does not fit, as overrides of
            another problem_type or of the labels.

    Example:
        >>> student = build_student(["bad", "good"], from_teacher={"layers": 3}, teacher=teacher)
    """
    if sum(way is not None for way in (model, config, from_teacher)) != 1:
        raise ValueError("a student needs exactly one of model, config and from_teacher")
    settings = task_settings(label_names, problem_type, overrides)
    if from_teacher is not None:
        if teacher is None:
            raise ValueError("from_teacher needs the teacher's model")
        if "layers" not in from_teacher:
            raise ValueError("from_teacher.layers is needed: the number of blocks")
        same = from_teacher.get("architecture") == "same"
        settings |= _dropout(
            teacher.config if same else AutoConfig.for_model("distilbert"), attention_dropout, settings
        )
        return student_from_teacher(teacher, settings, **from_teacher, say=say)
    if model is not None:
        if attention_dropout is not None:
            settings |= _dropout(load_config(model, revision), attention_dropout, settings)
        student, source = load_for_labels(model, revision, **settings), f"from {model}"
    else:
        given = {**(config or {}), **settings}
        settings |= _dropout(_known_config(given.get("model_type")), attention_dropout, given)
        student, source = model_from_config(config or {}, settings), "from scratch"
    say(f"student: {student.config.model_type} {source}")
    return student


def load_for_labels(name: str, revision: str | None = None, **settings: Any) -> PreTrainedModel:
    """`load_classifier` with other labels; a finished classifier's head gives its logits in their order."""
    saved, model = load_config(name, revision), load_classifier(name, revision, **settings)
    if is_classifier(saved):
        order_head(model, saved)
    return model


def attention_dropout_name(config: Any) -> str | None:
    """What a model's config calls the dropout of its attention; None where it has none.

    Example:
        >>> attention_dropout_name(BertConfig())
        'attention_probs_dropout_prob'
    """
    known = config.to_dict()
    return next((name for name in _ATTENTION_DROPOUT if name in known), None)


def _dropout(config: Any, rate: float | Literal["auto"] | None, given: dict[str, Any]) -> dict[str, Any]:
    """The setting of a config like this one that makes its attention dropout this rate."""
    if rate is None:
        return {}
    name = attention_dropout_name(config)
    if rate == "auto":
        return {} if name is None or name in given else {name: 0.0}
    if name is None:
        raise ValueError(f"attention_dropout is none of {config.model_type}'s settings: leave it out")
    if name in given:
        raise ValueError(f"attention_dropout is set twice, also as {name}: leave one of them out")
    return {name: rate}


def _known_config(model_type: Any) -> Any:
    """The default config of a kind of model.

    Raises:
        ValueError: there is no such kind.
    """
    try:
        return AutoConfig.for_model(model_type)
    except ValueError:
        raise ValueError(
            f'config.model_type must name a Transformers model, e.g. "distilbert", got {model_type!r}'
        ) from None


def model_from_config(config: dict[str, Any], settings: dict[str, Any]) -> PreTrainedModel:
    """A model with random weights from `{"model_type": ..., ...}`.

    Raises:
        ValueError: an unknown model type, a setting that this type does not know, labels, or sizes that do not fit.
    """
    refuse_labels(config, "config")
    config = {**config, **settings}
    model_type = config.pop("model_type", None)
    check_settings(_known_config(model_type), config, "config")
    with said_in_one_line(f"config: no {model_type} can be made of it"):
        made = AutoConfig.for_model(model_type, **config)
        check_sizes(made, "config")
        return AutoModelForSequenceClassification.from_config(made)
