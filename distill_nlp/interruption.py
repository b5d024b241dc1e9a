"""SIGTERM and SIGINT: a training finishes its step and saves before it ends; everything else ends at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A launcher passes on to its ranks what the terminal has sent them already.
_REPEATED_SECONDS = 5.0


class Interrupted(KeyboardInterrupt):
    """A signal has ended the work.

    Args:
        signum: number of the signal.
        saved: what was saved last, in words; "" outside of a training.
    """

    def __init__(self, signum: int, saved: str = "") -> None:
        super().__init__(f"{signal.Signals(signum).name}{f': {saved}' if saved else ''}")
        self.signum = signum
        self.saved = saved

    @property
    def exit_code(self) -> int:
        """130 or 143, as a shell gives it."""
        return 128 + self.signum


class SignalWatch:
    """Takes SIGINT and SIGTERM while a block runs.

    The first one ends the block by `Interrupted`; during `deferring` it is only noted. The second one ends the process
    as if nobody watched. Afterwards the handlers are what they were.

    Args:
        notice: gets a line when a signal is noted; must be fit to be called from a handler.

    Example:
        >>> with SignalWatch():
        ...     trainer.train()
    """

    def __init__(self, notice: Callable[[str], None] = lambda line: None) -> None:
        self.signum = 0
        self._notice = notice
        self._deferred = 0
        self._noted_at = 0.0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}
        self._groups: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        global _active
        # Python lets only the main thread take signals; one that was ignored (`nohup`, a shell's `&`) stays so.
        if threading.current_thread() is threading.main_thread() and _active is None:
            for signum in _SIGNALS:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._before[signum] = signal.signal(signum, self._take)
            _active = self
        return self

    def __exit__(self, *error: Any) -> None:
        global _active
        if _active is self:
            _active = None
            for signum, handler in self._before.items():
                signal.signal(signum, handler)

    def _take(self, signum: int, frame: Any) -> None:
        if os.getpid() != self._process:
            # A worker that was forked: its parent tells it when to end.
            if signum == signal.SIGTERM:
                _end_as_if_unwatched(signum)
            return
        if self.signum:
            if "LOCAL_RANK" in os.environ and time.monotonic() - self._noted_at < _REPEATED_SECONDS:
                return
            _end_as_if_unwatched(signum)
        self.signum, self._noted_at = signum, time.monotonic()
        if not self._deferred:
            raise Interrupted(signum)
        self._notice(f"{signal.Signals(signum).name}: finishing the step and saving; once more ends it at once")

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """A signal is only noted in this block, for `agreed` to be asked; it is raised at the end at the latest."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        if self.signum and not self._deferred:
            raise Interrupted(self.signum)

    def agreed(self, ranks: int) -> int:
        """The signal that any rank has noted, 0 where none has; the same on all ranks, which must all ask.

        Among several ranks it costs one reduction of a number between the CPUs; no device is waited for.
        """
        if ranks == 1:
            return self.signum
        import torch
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return self.signum
        world = id(dist.group.WORLD)
        if world not in self._groups:
            # NCCL reduces on GPUs alone, and the number would have to be fetched from there.
            self._groups[world] = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        noted = torch.tensor([self.signum])
        dist.all_reduce(noted, op=dist.ReduceOp.MAX, group=self._groups[world])
        return int(noted)


_active: SignalWatch | None = None


def active_watch() -> SignalWatch | None:
    """The watch whose block runs, if any."""
    return _active


def _end_as_if_unwatched(signum: int) -> None:
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


def write_from_handler(line: str) -> None:
    """A line on stderr; `print` may be in the middle of another one."""
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())
