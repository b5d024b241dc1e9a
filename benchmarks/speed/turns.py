"""Processes that take turns on one machine, so that what else it does meanwhile weighs on all of them alike."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from measuring import Seconds, cpu_of_children

TURN = 30.0


def timed_in_turns(commands: Sequence[Sequence[str]], folder: Path, turn: float = TURN) -> list[Seconds]:
    """Seconds of each command from its start to its end, without those in which it was stopped for the others.

    What they say goes to stderr; each has a cache of data sets of its own. All are in memory at once.

    Args:
        commands: in the order of their turns; one alone is never stopped.
        folder: that they run in.
        turn: seconds.

    Raises:
        SystemExit: one failed; the others are killed.
    """
    processes: dict[int, subprocess.Popen[bytes]] = {}
    wall, cpu = [0.0] * len(commands), [0.0] * len(commands)
    waiting = deque(range(len(commands)))
    with ExitStack() as stack:
        while waiting:
            i, busy, start = waiting.popleft(), cpu_of_children(), time.perf_counter()
            if i in processes:
                _signal(processes[i], signal.SIGCONT)
            else:
                datasets = stack.enter_context(tempfile.TemporaryDirectory())
                # Before its folder goes; a process that is stopped does not see Ctrl-C.
                stack.callback(_end, processes, i)
                environment = {"OMP_WAIT_POLICY": "passive"} | os.environ | {"HF_DATASETS_CACHE": datasets}
                # With a group of its own, which is stopped whole.
                processes[i] = subprocess.Popen(
                    commands[i], env=environment, cwd=folder, stdout=2, start_new_session=True
                )
            try:
                code = processes[i].wait(turn if waiting else None)
            except subprocess.TimeoutExpired:
                _signal(processes[i], signal.SIGSTOP)
                waiting.append(i)
            else:
                # Known of what has ended only, which is this one alone.
                cpu[i] = cpu_of_children() - busy
                if code:
                    raise SystemExit(f"exit code {code} of: {shlex.join(commands[i])}")
            wall[i] += time.perf_counter() - start
    return list(zip(wall, cpu, strict=True))


def _end(processes: dict[int, subprocess.Popen[bytes]], i: int) -> None:
    if i in processes:
        _signal(processes[i], signal.SIGKILL)
        processes[i].wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.poll() is None:
        os.killpg(process.pid, number)
