"""Reads an experiment from YAML and the command line; names every mistake at once, each with its path."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from distill_nlp.config import Experiment, did_you_mean
from distill_nlp.errors import UsageError


def load_experiment(path: str | Path, overrides: dict[str, Any] | None = None) -> Experiment:
    """Reads a YAML file, lays the overrides over it (dotted name -> value) and validates the whole.

    Raises:
        UsageError: no such file, no YAML, or settings that are wrong: each on a line, with its path.
    """
    path = Path(path)
    settings = read_settings(path, "config")
    for name, value in (overrides or {}).items():
        _set(settings, name, value)
    try:
        return Experiment.model_validate(settings)
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors()]
        head = f"{path}: {len(lines)} settings are wrong" if len(lines) > 1 else f"{path}:"
        raise UsageError("\n  ".join([head, *lines]) if len(lines) > 1 else f"{head} {lines[0]}") from None


def read_settings(path: Path, kind: str) -> dict[str, Any]:
    """The settings of a YAML file, not validated yet.

    Args:
        path: of the file.
        kind: what to call it in messages.

    Raises:
        UsageError: no such file, not to be read, no YAML, or no settings by name in it.
    """
    try:
        settings = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no {kind} file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the {kind} {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UsageError(f"{path} must hold settings by name, got {type(settings).__name__}")
    return settings


def read_yaml(text: str) -> Any:
    """Parses YAML safely: no objects, no key given twice, `1e-4` a number."""
    return yaml.load(text, Loader=_UniqueKeyLoader)


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


def _set(settings: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for i, name in enumerate(parents):
        inner = settings.get(name)
        if inner is None:
            inner = settings[name] = {}
        if not isinstance(inner, dict):
            raise UsageError(f"--{dotted}: {'.'.join(parents[: i + 1])} is not a block of settings")
        settings = inner
    settings[last] = value


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
    return f"{path}: {message[0].lower()}{message[1:]}, got {error['input']!r}"


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, where YAML would quietly take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-4 for a string, because it has no point.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
