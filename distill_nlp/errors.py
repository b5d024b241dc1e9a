"""The errors that a person at the terminal sees as one line."""

from __future__ import annotations


class DistillError(Exception):
    """Something failed that the user did not ask wrongly for; exit code 1."""

    exit_code = 1


class UsageError(DistillError):
    """A config, a file or a model is not what the command needs: what, where and what to do; exit code 2."""

    exit_code = 2
