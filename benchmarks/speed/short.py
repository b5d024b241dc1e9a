"""Training steps on short rows in bfloat16 on a CPU: PyTorch as it is, and what `distill-nlp run` does about them.

Huge pages are for a whole process: each pass is one of a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

from loops import Bare
from measuring import Figures, Pass, Seconds, in_a_process_of_its_own, measured
from workloads import Pair, fixed_rows

_IN_BF16 = Bare("none", bf16=True, attention_dropout=0.0, fused=True)
# With THP_MEM_ALLOC_ENABLE.
WAYS = {
    "bf16": (_IN_BF16, "0"),
    "bf16, attention in fp32": (replace(_IN_BF16, quick_attention=True), "0"),
    "bf16, attention in fp32, huge pages: `run` by itself": (replace(_IN_BF16, quick_attention=True), "1"),
    "fp32": (replace(_IN_BF16, bf16=False), "0"),
    "fp32, huge pages": (replace(_IN_BF16, bf16=False), "1"),
}


def tables(pair: Pair, rows: int, lengths: tuple[int, ...], rounds: int) -> Iterator[tuple[str, dict[str, Figures]]]:
    """Steps of the student alone in batches of 32, for each length of a row."""
    for tokens in lengths:
        passes = {name: _process(way, pages, pair, rows, tokens) for name, (way, pages) in WAYS.items()}
        title = f"steps of the student alone, 32x{tokens}, {rows} rows, no attention dropout"
        yield title, measured(passes, rounds)


def _process(way: Bare, pages: str, pair: Pair, rows: int, tokens: int) -> Pass:
    def once(seed: int) -> Seconds:
        with mock.patch.dict(os.environ, OMP_WAIT_POLICY="passive", THP_MEM_ALLOC_ENABLE=pages):
            return in_a_process_of_its_own(timed, way, pair, rows, tokens, seed)

    return once


def timed(way: Bare, pair: Pair, rows: int, tokens: int, seed: int) -> Seconds:
    """A pass in this process, after one that does not count."""
    once = way.on(pair, fixed_rows(rows, tokens), 32)
    once(seed + 1)
    return once(seed)
