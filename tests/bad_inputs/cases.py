"""The cases of the corpus as the YAML files beside this one hold them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
DRY_RUN = "run config.yaml --dry-run --no-doctor"


@dataclass(frozen=True)
class Case:
    """One input and what the command has to answer.

    Args:
        name: what is odd about the input.
        category: the file that it stands in.
        says: a regular expression that the error's line matches; of a valid input, None.
        exit: the exit code.
        command: words of the command line; `{here}` and `{models}` are folders.
        config: dotted settings over those of the base; "absent" takes one out.
        text: the whole config instead, as it stands.
        files: path -> text, below the case's folder.
        make: calls of `generators`: name -> keyword arguments.
        base: of the config and data: "single" or "multi_label".
    """

    name: str
    category: str
    says: str | None = None
    exit: int = 2
    command: str = DRY_RUN
    config: dict[str, Any] = field(default_factory=dict)
    text: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    make: dict[str, dict[str, Any]] = field(default_factory=dict)
    base: str = "single"


def all_cases() -> list[Case]:
    """Every case of every file; a file's `defaults` stand in for what its cases do not say.

    Raises:
        ValueError: two cases of one name, or a refusal that says nothing.
    """
    cases = []
    for file in sorted(FOLDER.glob("*.yaml")):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        defaults = content.get("defaults", {})
        cases += [Case(category=file.stem, **(defaults | case)) for case in content["cases"]]
    names = [(case.category, case.name) for case in cases]
    if len(set(names)) < len(names):
        raise ValueError(f"given twice: {sorted(name for name in set(names) if names.count(name) > 1)}")
    if silent := [case.name for case in cases if case.exit != 0 and not case.says]:
        raise ValueError(f"without an expected message: {silent}")
    return cases
