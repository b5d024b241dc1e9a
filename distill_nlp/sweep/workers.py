"""Workers: each takes one trial after the other; several are processes, and any of them may die."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from distill_nlp.errors import DistillError
from distill_nlp.stage_training import Say
from distill_nlp.sweep.plan import SweepPlan
from distill_nlp.sweep.study import SweepStudy
from distill_nlp.sweep.trial import TeacherHome, run_trial


def work(
    plan: SweepPlan,
    study: SweepStudy,
    base: TeacherHome,
    say: Say,
    after_trial: Callable[[], object],
    go_on: Callable[[], bool] = lambda: True,
) -> None:
    """Runs trials until none is left to take.

    Args:
        plan, study: of the sweep.
        base: the teacher of most trials.
        say: gets a line before and after each trial.
        after_trial: called when one has ended.
        go_on: asked before each.
    """
    while go_on() and (claim := study.claim()) is not None:
        settings = ", ".join(f"{name} {value}" for name, value in claim.settings.items())
        going_on = ", begun by another worker" if claim.taken_over else ""
        say(f"trial {claim.number}{going_on}: {settings}")
        try:
            line = run_trial(plan, study, claim, base, say)
        except KeyboardInterrupt:
            claim.give_up()
            raise
        say(f"trial {claim.number}: {line} ({study.finished} of {study.wanted})")
        after_trial()
        # What a failed trial held of the device must not fail the next one.
        gc.collect()
        torch.cuda.empty_cache()


def work_in_processes(count: int, target: Callable[..., None], arguments: tuple[Any, ...], say: Say) -> None:
    """Runs `target(say, go_on, *arguments)` in `count` processes and speaks for them.

    A process that ends badly is said, and nothing more: its trial is there for the others.

    Args:
        count: of processes.
        target: a function of a module.
        arguments: what can be pickled.
        say: gets their lines.
    """
    context = multiprocessing.get_context("spawn")
    ends: dict[Connection, Any] = {}
    processes = []
    for i in range(count):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(i, count, sender, target, arguments))
        process.start()
        # Only the child's end is left open, so that its death shows here.
        sender.close()
        processes.append(process)
        ends[receiver] = i + 1
    try:
        while ends:
            for receiver in wait(list(ends)):
                try:
                    say(f"worker {ends[receiver]}: {receiver.recv()}")
                except EOFError:
                    del ends[receiver]
        for i, process in enumerate(processes, 1):
            process.join()
            if process.exitcode:
                say(f"worker {i}: ended with code {process.exitcode}")
    except BaseException:
        _end(processes)
        raise


def _end(processes: list[Any], seconds: float = 20) -> None:
    """Ctrl-C in a terminal reaches all; where it did not, they are asked, and then made to."""
    steps = (lambda p: None, lambda p: os.kill(p.pid, signal.SIGINT), lambda p: p.terminate())
    for step, patience in zip(steps, (2, seconds, seconds), strict=True):
        for process in processes:
            if process.is_alive():
                step(process)
        limit = time.monotonic() + patience
        for process in processes:
            process.join(max(0.0, limit - time.monotonic()))


def _child(index: int, count: int, lines: Connection, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    _take_share(index, count)
    _keep_quiet()
    parent = multiprocessing.parent_process()

    def go_on() -> bool:
        return parent is None or parent.is_alive()

    def say(line: str) -> None:
        # Without anyone to hear, the trial ends, and the worker after it.
        if go_on():
            lines.send(line)

    try:
        target(say, go_on, *arguments)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        name = "" if isinstance(error, DistillError) else f"{type(error).__name__}: "
        say(f"{name}{' '.join(str(error).split())}")
        raise SystemExit(1) from None


def _keep_quiet() -> None:
    """Several bars on one terminal are none; what went wrong in a trial stands in its log."""
    import datasets
    import transformers

    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _take_share(index: int, count: int) -> None:
    """This worker's part of the machine: a GPU, where there are several, and of the CPU's threads."""
    devices = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    devices = devices or [str(i) for i in range(torch.cuda.device_count())]
    if len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[index % len(devices)]
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
