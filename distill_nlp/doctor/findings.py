"""What a check says: a level, what was found, why it matters and the setting that mends it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from distill_nlp.errors import DistillError

Level = Literal["stop", "warning", "ok"]

EXIT_STOP = 2
"""Exit code where a finding is a stop."""


@dataclass(frozen=True)
class Finding:
    """One thing that a check looked at.

    Args:
        level: "stop": the run would fail, or its result mean nothing; "warning": it goes on, worse or dearer than it
            need be; "ok".
        check: short name of the check.
        what: what was looked at and what was found, with figures.
        why: what comes of it; needed unless ok.
        fix: what to do, with the setting to type; needed unless ok.

    Raises:
        ValueError: another level, or a stop or warning without a reason or a fix.

    Example:
        >>> Finding("warning", "rows", "40 training rows", "too few to learn from", "label more rows")
    """

    level: Level
    check: str
    what: str
    why: str = ""
    fix: str = ""

    def __post_init__(self) -> None:
        if self.level not in ("stop", "warning", "ok"):
            raise ValueError(f"level must be stop, warning or ok, got {self.level!r}")
        if self.level != "ok" and not (self.why and self.fix):
            raise ValueError(f"a {self.level} says why it matters and how to mend it; {self.check!r} does not")


def guarded(check: str, run: Callable[[], Finding | Iterable[Finding]]) -> list[Finding]:
    """The findings of one check; what goes wrong inside becomes a finding too.

    Args:
        check: name for the finding of an error.
        run: gives one finding or several.

    Returns:
        What `run` gave. A `DistillError` (data or models that do not fit, which would end the run) becomes a stop with
        its message, any other error a warning that nothing was checked.
    """
    try:
        found = run()
        return [found] if isinstance(found, Finding) else list(found)
    except DistillError as error:
        return [Finding("stop", check, str(error), "the run would end with this message", "change what it names")]
    except Exception as error:
        message = " ".join(str(error).split())
        return [
            Finding(
                "warning",
                check,
                f"could not be checked: {type(error).__name__}: {message}",
                "nothing is known about it; the run may meet the same error",
                "run with --debug if the run fails too; else go on",
            )
        ]


def exit_code(findings: Sequence[Finding]) -> int:
    """2 where one of them is a stop, else 0."""
    return EXIT_STOP if any(finding.level == "stop" for finding in findings) else 0
