"""The errors that a person at the terminal sees as one line, and how any value is shown in one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from distill_nlp.hub.private import masked

LONGEST_LINE = 1000
"""Characters; what a mistaken value is made of may be a megabyte."""


class DistillError(Exception):
    """Something failed that the user did not ask wrongly for; exit code 1.

    Args:
        message: one line.
        mistakes: a line each, where several things are wrong at once.
    """

    exit_code = 1

    def __init__(self, message: str, mistakes: Sequence[str] = ()) -> None:
        super().__init__("\n  ".join([message, *mistakes]))
        self.lines = [message, *(f"  {mistake}" for mistake in mistakes)]


class UsageError(DistillError):
    """A config, a file or a model is not what the command needs: what, where and what to do; exit code 2."""

    exit_code = 2


def one_line(text: str, longest: int = LONGEST_LINE) -> str:
    r"""A text as a single line that a terminal shows as it stands, without tokens.

    Line breaks become spaces and what is not printable (colours and cursor movements of a terminal among them) its
    escape; what is too long is cut in its middle, as the end often says what to do.

    Example:
        >>> one_line("a\nb\x1b[31m")
        'a b\\x1b[31m'
    """
    spaced = " ".join(masked(text).split("\n")).replace("\t", " ")
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in spaced)
    if len(line) <= longest:
        return line
    tail = longest // 3
    return f"{line[: longest - tail - 5]} ... {line[-tail:]}"


def shown(value: Any) -> str:
    """A value in a message: its `repr`, at most 200 characters of it."""
    return one_line(repr(value), 200)


def first_line(error: BaseException) -> str:
    """What an error says, on one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


@contextmanager
def said_in_one_line(what: str) -> Iterator[None]:
    """What a setting of a wrong kind or size leads to is each model's own: KeyError, AssertionError, RuntimeError.

    Args:
        what: could not be done.

    Raises:
        ValueError: what was raised, after `what`; a ValueError is left as it is.
    """
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{what}: {type(error).__name__}: {first_line(error)}") from None
