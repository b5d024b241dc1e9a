"""Training steps on short rows in bfloat16 on a CPU: PyTorch as it is, with our attention, and in huge pages.

Huge pages are for a whole process: each pass is one of a process of its own.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

from loops import Bare
from measuring import Figures, Pass, Seconds, in_a_process_of_its_own, measured
from memory import begin_peak, peak_since
from workloads import Pair, fixed_rows

_IN_BF16 = Bare("none", bf16=True, attention_dropout=0.0, fused=True)
# With THP_MEM_ALLOC_ENABLE.
WAYS = {
    "bf16": (_IN_BF16, "0"),
    "bf16, attention in fp32: as `DistillationTrainer` trains": (replace(_IN_BF16, quick_attention=True), "0"),
    "the same, huge pages": (replace(_IN_BF16, quick_attention=True), "1"),
    "fp32": (replace(_IN_BF16, bf16=False), "0"),
    "fp32, huge pages": (replace(_IN_BF16, bf16=False), "1"),
}


def tables(pair: Pair, rows: int, lengths: list[int], rounds: int) -> Iterator[tuple[str, dict[str, Figures]]]:
    """Steps of the student alone in batches of 32, for each length of a row; and the most memory of the processes."""
    if pair.device.type != "cpu":
        raise SystemExit("the part short is of CPUs: hide the accelerator")
    for tokens in lengths:
        peaks: dict[str, list[int]] = {name: [] for name in WAYS}
        passes = {name: _process(way, peaks[name], pair, rows, tokens) for name, way in WAYS.items()}
        found = measured(passes, rounds)
        for name, figures in found.items():
            # The first pass is not counted.
            figures["peak_mib"] = statistics.median(peaks[name][1:]) / 2**20
        yield f"steps of the student alone, 32x{tokens}, {rows} rows, no attention dropout", found


def _process(way: tuple[Bare, str], peaks: list[int], pair: Pair, rows: int, tokens: int) -> Pass:
    loop, pages = way

    def once(seed: int) -> Seconds:
        with mock.patch.dict(os.environ, OMP_WAIT_POLICY="passive", THP_MEM_ALLOC_ENABLE=pages):
            seconds, peak = in_a_process_of_its_own(timed, loop, pair, rows, tokens, seed)
        peaks.append(peak)
        return seconds

    return once


def timed(loop: Bare, pair: Pair, rows: int, tokens: int, seed: int) -> tuple[Seconds, int]:
    """A pass in this process, after one that does not count; and the most bytes that the process had."""
    begin_peak()
    once = loop.on(pair, fixed_rows(rows, tokens), 32)
    once(seed + 1)
    return once(seed), peak_since()
