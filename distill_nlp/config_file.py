"""Reads an experiment from YAML and the command line; names every mistake at once, each with its path."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from distill_nlp.config import Experiment, did_you_mean
from distill_nlp.errors import UsageError, one_line, shown
from distill_nlp.yaml_text import read_yaml

MAX_KB = 256
"""A config is written by people; a larger file is another one by mistake, and takes minutes to parse."""
# A class may have any name.
_TAKEN_AS_THEY_STAND = ("data.label_names",)


def load_experiment(path: str | Path, overrides: dict[str, Any] | None = None) -> Experiment:
    """Reads a YAML file, lays the overrides over it (dotted name -> value) and validates the whole.

    Entries of a list go by their number: `phases.1.losses.kl.temperature`.

    Raises:
        UsageError: no such file, no YAML, or settings that are wrong: each on a line, with its path; or an override
            that changes nothing, because each phase has what it sets.
    """
    path = Path(path)
    # What an alias of YAML stands for is one object in several places.
    settings = _unshared(read_settings(path, "config"))
    for name, value in (overrides or {}).items():
        _set(settings, name, value)
    for name, value in (overrides or {}).items():
        _leave_out_what_it_replaces(settings, name, value, overrides or {})
    _refuse_placeholders(settings, path)
    try:
        experiment = Experiment.model_validate(settings)
    except ValidationError as error:
        # A phase is validated as it stands and again with what it is laid over.
        lines = list(dict.fromkeys(one_line(_explain(e)) for e in error.errors()))
        if len(lines) == 1:
            raise UsageError(f"{path}: {lines[0]}") from None
        raise UsageError(f"{path}: {len(lines)} settings are wrong", lines) from None
    _refuse_what_phases_hide(experiment, overrides or {})
    return experiment


def read_settings(path: Path, kind: str) -> dict[str, Any]:
    """The settings of a YAML file, not validated yet.

    Args:
        path: of the file.
        kind: what to call it in messages.

    Raises:
        UsageError: no such file, not to be read, no YAML, or no settings by name in it.
    """
    try:
        size = path.stat().st_size
        if size > MAX_KB * 1024:
            raise UsageError(f"{path} has {size / 1e6:.1f} MB; a {kind} is at most {MAX_KB} KB: is it another file?")
        settings = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no {kind} file {path}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"the {kind} {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the {kind} {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if settings is None:
        raise UsageError(f"the {kind} {path} is empty; it must hold settings by name")
    if not isinstance(settings, dict):
        raise UsageError(f"{path} must hold settings by name, got {type(settings).__name__}")
    return settings


def _refuse_placeholders(value: Any, path: Path, name: str = "") -> None:
    """`${HOME}` would be taken as it stands: for a folder of that name, or for something on the Hub."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_placeholders(inner, path, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and name not in _TAKEN_AS_THEY_STAND:
        for i, inner in enumerate(value):
            _refuse_placeholders(inner, path, f"{name}.{i}")
    elif isinstance(value, str) and (found := re.search(r"\$\{[^}]*\}", value)):
        raise UsageError(
            f"{path}: {name}: {found[0]} is not filled in here; write the value, or give it as --{name} VALUE"
        )


def leaves(model: type[BaseModel] = Experiment, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting by its dotted name, for the command line and its help."""
    for name, field in model.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _section_of(annotation: Any) -> type[BaseModel] | None:
    options = (
        typing.get_args(annotation)
        if typing.get_origin(annotation) in (typing.Union, types.UnionType)
        else (annotation,)
    )
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def name_outside_phases(name: str) -> str:
    """What a setting is called where it is not one of a phase: `phases.1.losses.kl.weight` -> `losses.kl.weight`."""
    return re.sub(r"^phases\.\d+\.", "", name)


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def _set(settings: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    inner: Any = settings
    for i, name in enumerate([*parents, last]):
        path = ".".join(parents[:i])
        if path == "phases" and not inner:
            raise UsageError(f"--{dotted}: there are no phases")
        if isinstance(inner, list):
            if not (name.isdecimal() and int(name) < len(inner)):
                raise UsageError(f"--{dotted}: {path} has {len(inner)} entries, counted from 0, got {name}")
            key: Any = int(name)
        elif isinstance(inner, dict):
            key = name
        else:
            raise UsageError(f"--{dotted}: {path} is not a block of settings")
        if i == len(parents):
            inner[key] = value
            return
        if isinstance(inner, dict) and inner.get(key) is None:
            inner[key] = {}
        inner = inner[key]


def _refuse_what_phases_hide(experiment: Experiment, names: Iterable[str]) -> None:
    """What is given for all phases, each of which has its own, would not reach the student, and nobody would see it.

    Args:
        experiment: with the overrides in it.
        names: of the overrides.
    """
    phases = experiment.phases
    for name in names if phases else ():
        block, _, rest = name.partition(".")
        if block == "losses":
            hidden = all(phase.losses is not None for phase in phases)
            own = "losses of its own"
            instead = [i for i, phase in enumerate(phases) if rest.partition(".")[0] in (phase.losses or {})]
        elif name in ("training.num_train_epochs", "training.max_steps"):
            # Steps come before epochs, but a training's own epochs before steps that are shared; a stream has none.
            lengths = {rest, "max_steps"} if experiment.data.streaming else {"num_train_epochs", "max_steps"}
            hidden = all(lengths & phase.training.model_fields_set for phase in phases)
            own, instead = "a length of its own", list(range(len(phases)))
        else:
            continue
        if hidden:
            ways = " and ".join(f"phases.{i}.{name}" for i in instead or [len(phases) - 1])
            if block == "training" and rest not in experiment.teacher.training.model_fields_set:
                ways += f", or teacher.{name} for the teacher"
            raise UsageError(f"{name} does not reach the student: each phase has {own}; set {ways}")


def _leave_out_what_it_replaces(settings: dict[str, Any], dotted: str, value: Any, overrides: dict[str, Any]) -> None:
    """The file's other way to say a precision, or a length, which would contradict the one on the command line."""
    *parents, last = dotted.split(".")
    if last == "precision":
        others: tuple[str, ...] = ("bf16", "fp16")
    elif last in ("bf16", "fp16") and value is True:
        others = ("precision",)
    elif last == "num_train_epochs" and not (settings.get("data") or {}).get("streaming"):
        # Steps come before epochs, so that these would change nothing.
        others = ("max_steps",)
    else:
        return
    inner: Any = settings
    for name in parents:
        # Another override may have put something else there.
        is_there = name.isdecimal() and int(name) < len(inner) if isinstance(inner, list) else name in inner
        if not is_there:
            return
        inner = inner[int(name) if isinstance(inner, list) else name]
    for other in others:
        if ".".join([*parents, other]) not in overrides:
            inner.pop(other, None)


def _explain(error: Any) -> str:
    """One line of a pydantic error: the path, what was expected, what came."""
    path = ".".join(str(part) for part in error["loc"] if not str(part).startswith(("literal[", "list[")))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        section: Any = Experiment
        for part in error["loc"][:-1]:
            field = section.model_fields.get(part) if section else None
            section = _section_of(field.annotation) if field else None
        return f"{path}: unknown setting{did_you_mean(str(error['loc'][-1]), section.model_fields if section else {})}"
    if error["type"] == "missing":
        return f"{path}: is needed"
    if error["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}: {message[0].lower()}{message[1:]}, got {shown(error['input'])}"
