"""Workers: each takes one trial after the other; several are processes, and any of them may die."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from accelerate.utils import patch_environment

from distill_nlp.errors import DistillError, UsageError
from distill_nlp.stage_training import Say
from distill_nlp.sweep.plan import SweepPlan
from distill_nlp.sweep.study import SweepStudy
from distill_nlp.sweep.trial import TeacherHome, run_trial

_VISIBLE = "CUDA_VISIBLE_DEVICES"


@contextmanager
def first_gpu_alone() -> Iterator[str | None]:
    """Within it this process sees the first of its GPUs and no other, as a training takes all that it sees.

    It must begin before CUDA does, which reads the variable once; `refuse_several_gpus` finds out. Gives what the
    variable was, from which each worker takes a GPU of its own.
    """
    visible = os.environ.get(_VISIBLE)
    # "" stays: it is no GPU.
    first = "0" if visible is None else visible.split(",")[0].strip()
    with patch_environment(**{_VISIBLE: first}):
        yield visible


def refuse_several_gpus() -> None:
    """Refuses a process that used CUDA before it was left one GPU; each of its trials would fail, and count.

    Raises:
        UsageError: it still sees several.
    """
    if not torch.cuda.is_available():
        return
    torch.cuda.init()  # until then the count follows the variable, whatever CUDA has read
    if (count := torch.cuda.device_count()) > 1:
        raise UsageError(
            f"this process has used CUDA already, with {count} GPUs, and a trial takes one: start the sweep before "
            "that, or with CUDA_VISIBLE_DEVICES=0"
        )


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


def work_in_processes(
    count: int, target: Callable[..., None], arguments: tuple[Any, ...], say: Say, visible: str | None
) -> None:
    """Runs `target(say, go_on, *arguments)` in `count` processes and speaks for them.

    A process that ends badly is said, and nothing more: its trial is there for the others.

    Args:
        count: of processes.
        target: a function of a module.
        arguments: what can be pickled.
        say: gets their lines.
        visible: CUDA_VISIBLE_DEVICES with the GPUs that they share; None: all.
    """
    context = multiprocessing.get_context("spawn")
    ends: dict[Connection, Any] = {}
    processes = []
    for i in range(count):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(i, count, visible, sender, target, arguments))
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


def _child(
    index: int,
    count: int,
    visible: str | None,
    lines: Connection,
    target: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    _take_share(index, count, visible)
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


def _take_share(index: int, count: int, visible: str | None) -> None:
    """This worker's part of the machine: a GPU, where there are several, and of the CPU's threads.

    Of the GPUs in `visible`: what this process has in its environment is the part of the one that started it.
    """
    if visible is None:
        os.environ.pop(_VISIBLE, None)
    else:
        os.environ[_VISIBLE] = visible
    devices = [d.strip() for d in (visible or "").split(",") if d.strip()]
    devices = devices or [str(i) for i in range(torch.cuda.device_count())]
    if len(devices) > 1:
        os.environ[_VISIBLE] = devices[index % len(devices)]
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
