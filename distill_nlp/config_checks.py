"""What several blocks of settings check alike."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from distill_nlp.errors import shown

LONGEST_NAME = 255
"""Bytes in the name of a file or folder, on all usual file systems."""


def did_you_mean(name: str, known: Any) -> str:
    """The known name that was meant, as the end of a message; empty where none is near."""
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def no_truth_value(cls: type[BaseModel], value: Any, info: ValidationInfo) -> Any:
    """Refuses true and false where a number is wanted: Python takes them for 1 and 0."""
    kinds = set(re.findall(r"\w+", str(cls.model_fields[info.field_name or ""].annotation)))
    found = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, bool)]
    if found and kinds & {"int", "float"} and "bool" not in kinds:
        raise ValueError(f"must be a number, got {str(found[0]).lower()}")
    return value


def mistake(name: str, value: Any, message: str) -> InitErrorDetails:
    """A mistake in a setting, for a `ValidationError` that has several."""
    # A template in braces would be filled in; the message is final.
    escaped = message.replace("{", "{{").replace("}", "}}")
    return InitErrorDetails(type=PydanticCustomError("value_error", escaped), loc=(name,), input=value)


class Section(BaseModel):
    """A block of settings; a name that it does not know is refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    _numbers = field_validator("*", mode="before")(classmethod(no_truth_value))


def folder_name(name: str | None) -> str | None:
    """Refuses what cannot be a folder to write to."""
    if name is None:
        return None
    if not name.strip():
        raise ValueError("is empty; name a folder")
    if not name.isprintable():
        raise ValueError(f"has a character that is not printable: {shown(name)}")
    if longest := [part for part in name.split("/") if len(part.encode()) > LONGEST_NAME]:
        raise ValueError(f"has a name of {len(longest[0].encode())} bytes; a folder's has {LONGEST_NAME} at most")
    return name
