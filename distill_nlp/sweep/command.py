"""A trial's settings as a command line that runs the whole experiment with them."""

from __future__ import annotations

import json
import shlex
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from distill_nlp.config_file import leaves, name_outside_phases
from distill_nlp.sweep.plan import SweepPlan
from distill_nlp.yaml_text import read_yaml


def run_command(plan: SweepPlan, settings: Mapping[str, Any], output_dir: Path) -> str:
    """The command for a shell: the sweep's overrides and these settings over its experiment.

    Args:
        plan: of the sweep.
        settings: of a trial, by dotted name.
        output_dir: where its teacher lies, so that it is not trained again.
    """
    changes = plan.changes(settings) | {"output_dir": str(output_dir)}
    words = ["distill-nlp", "run", str(plan.config)]
    for name, value in changes.items():
        words += [f"--{name}", argument(name, value)]
    return shlex.join(words)


def argument(name: str, value: Any) -> str:
    """A value as the command reads it: text as it stands where the setting is text, else YAML."""
    field = dict(leaves()).get(name_outside_phases(name))
    if field is not None and isinstance(value, str):
        is_union = typing.get_origin(field.annotation) in (typing.Union, types.UnionType)
        kinds = set(typing.get_args(field.annotation) if is_union else (field.annotation,)) - {type(None)}
        if kinds == {str} or typing.get_origin(field.annotation) is typing.Literal:
            return value
    return shown(value)


def shown(value: Any) -> str:
    """YAML on one line, without quotation marks where it reads back without them."""
    if isinstance(value, str):
        try:
            plain = value == read_yaml(value) and "," not in value and not value.startswith("--")
        except yaml.YAMLError:
            plain = False
        if plain:
            return value
    return json.dumps(value, ensure_ascii=False)
