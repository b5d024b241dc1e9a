"""Settings on the command line: their options and help, and their values as YAML or plain text."""

from __future__ import annotations

import argparse
import types
import typing
from collections import deque
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from distill_nlp.config_file import leaves, name_outside_phases
from distill_nlp.errors import UsageError, shown
from distill_nlp.yaml_text import read_yaml

_TEACHER_TRAINING = "teacher.training."


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The config, and every setting of it."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file; every setting can be overridden as below")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
    groups: dict[str, Any] = {}
    for name, field in leaves():
        section = name.partition(".")[0] if "." in name else "the experiment"
        if name == "losses" or name.startswith(_TEACHER_TRAINING):
            continue
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        # A flag may stand alone, as that of other commands does.
        flag = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
        groups[section].add_argument(f"--{name}", metavar="", default=argparse.SUPPRESS, help=_help(field), **flag)


def dotted(rest: list[str]) -> dict[str, Any]:
    """`--a.b value` and `--a.b=value`: also of names that only validation knows, as losses."""
    overrides, fields = {}, dict(leaves())
    words = deque(rest)
    while words:
        word = words.popleft()
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            raise UsageError(f"unknown argument {word}; settings are given as --data.max_length 128")
        field = fields.get(name_outside_phases(name))
        if not equals:
            has_value = bool(words) and bool(words[0]) and not words[0].startswith("--")
            if not has_value and (field is None or field.annotation is not bool):
                raise UsageError(f"{word} needs a value")
            value = words.popleft() if has_value else "true"
        overrides[name] = _yaml(value, name) if field is None else value_of(value, name, field)
    return overrides


def _yaml(text: str, name: str) -> Any:
    try:
        return read_yaml(text)
    except yaml.YAMLError:
        raise UsageError(f"--{name}: {shown(text)} is not valid YAML; quote it") from None


def value_of(text: str, name: str, field: FieldInfo) -> Any:
    """A setting's value: text as it stands where text is meant, else YAML; `0,1,2` for a list."""
    is_union = typing.get_origin(field.annotation) in (typing.Union, types.UnionType)
    kinds = set(typing.get_args(field.annotation) if is_union else (field.annotation,)) - {type(None)}
    if kinds == {str} or typing.get_origin(field.annotation) is typing.Literal:
        return None if text == "null" and type(None) in typing.get_args(field.annotation) else text
    of_text = list[str] in kinds
    if "list" in str(field.annotation) and not text.lstrip().startswith("[") and "," in text:
        return [part.strip() if of_text else _yaml(part, name) for part in text.split(",")]
    value = _yaml(text, name)
    if field.annotation == list[str]:
        return [text] if isinstance(value, str) else value
    return [value] if field.annotation == list[int] and isinstance(value, int) else value


def _help(field: FieldInfo) -> str:
    text = (field.description or "").replace("%", "%%")
    choices = [
        str(c) for c in typing.get_args(field.annotation) if typing.get_origin(field.annotation) is typing.Literal
    ]
    if choices:
        text += f" ({', '.join(choices)})"
    if field.is_required():
        return f"{text} [required]"
    default = field.get_default(call_default_factory=True)
    return text if default is None else f"{text} [{default}]"


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
