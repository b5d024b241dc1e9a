"""What all commands do with the terminal."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill_nlp.hub.private import masked

_AFTER_INTERRUPTION = {
    "run": "the same command goes on from the last checkpoint",
    "cache": "the same command computes what is missing",
    "sweep": "the same command goes on with its trials",
}
AFTER_STORAGE = {
    name: f"make room, or give permission, and {hint}; what was finished before is as it was"
    for name, hint in _AFTER_INTERRUPTION.items()
}
"""Command -> what to do when the disk refused something."""


def interruption_line(command: str, error: KeyboardInterrupt, arguments: Sequence[str] | None) -> str:
    """What was interrupted, what is saved, and how to go on.

    Args:
        command: that was given.
        error: an `Interrupted`, or a plain Ctrl-C.
        arguments: of the command line; those of the process where not given.
    """
    happened = f"interrupted ({error})" if str(error) else "interrupted"
    if command not in _AFTER_INTERRUPTION:
        return happened
    if not getattr(error, "saved", ""):
        return f"{happened}; {_AFTER_INTERRUPTION[command]}"
    if "WORLD_SIZE" in os.environ:
        return f"{happened}; the same launch goes on from there"
    given, shown = list(sys.argv[1:] if arguments is None else arguments), ["distill-nlp"]
    for before, argument in zip(["", *given], given, strict=False):
        # A token has no place in a log.
        name, equals, _ = argument.partition("=")
        secret = "token" in name and equals
        shown.append("..." if "token" in before and "=" not in before else f"{name}=..." if secret else argument)
    return f"{happened}; go on with: {shlex.join(shown)}"


def to_stderr(line: str) -> None:
    """One line for the user, without tokens and credentials that a setting's value may hold."""
    print(masked(line), file=sys.stderr, flush=True)


def quiet(debug: bool) -> None:
    """Keeps the libraries' chatter away; progress bars only where someone watches."""
    import datasets
    import transformers

    if not debug:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        # An error of theirs is logged and raised; the command says it, once.
        datasets.logging.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty() or not is_main_rank():
        datasets.disable_progress_bars()


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Adds the switch that lets models run code of their own."""
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run code that comes with a model or tokenizer [off]"
    )


def trust_if_asked(known: argparse.Namespace) -> None:
    """Heeds the switch, and says so."""
    from distill_nlp.loading import trust_remote_code

    trust_remote_code(known.trust_remote_code, to_stderr)


def is_main_rank() -> bool:
    """Whether this is the first process of a launch, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def show_report(report: dict[str, Any], folder: Path) -> None:
    """The report's table, and where its page lies."""
    from rich.console import Console

    from distill_nlp.report import PAGE_FILE, terminal_table

    Console().print(terminal_table(report))
    # As it stands: rich would break a long path.
    print(folder / PAGE_FILE)
