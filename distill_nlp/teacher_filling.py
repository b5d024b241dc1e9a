"""One teacher's answers for the rows of a data set: what its cache lacks is computed, by all ranks of a launch."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill_nlp.cache_rows import keys_of, token_columns
from distill_nlp.durable_files import remove_leftovers
from distill_nlp.errors import DistillError, UsageError
from distill_nlp.inference import batched_answers, length_sorted_batches
from distill_nlp.losses.base import ModelShape
from distill_nlp.teacher import TEACHER_PREFIX, pooled_column
from distill_nlp.teacher_cache import PRECISIONS, STORAGES, AnswerCache, not_to_be_kept, output_identity
from distill_nlp.teacher_source import TeacherSource, launch

logger = logging.getLogger(__name__)

# A shard is written at the first of these: a killed fill loses no more.
SHARD_ROWS = 8192
SHARD_SECONDS = 30.0

State = tuple[int, str]
"""(layer, "first" or "mean"): a layer of the teacher as one vector per text."""


@dataclass
class FillSettings:
    """What is the same for all teachers of a data set; see `cache_teacher_logits`."""

    folder: str | Path
    tokenizer: Any
    states: list[State]
    storage: str
    mixed_precision: str
    batch_size: int
    say: Callable[[str], None]


class TeacherFilling:
    """One teacher's part: the rows that one of its outputs lacks are computed once for all of these.

    Args:
        source: the teacher.
        title: tells it from the others; "" where it is alone.
        dataset: a tokenized `datasets.Dataset`.
        settings: of the fill.

    Raises:
        ValueError: no `datasets.Dataset`, or no token ids in it; an unknown setting or layer.
    """

    def __init__(self, source: TeacherSource, title: str, dataset: Any, settings: FillSettings) -> None:
        depth = ModelShape.from_config(source.config).num_layers
        if depth is not None and settings.states and max(settings.states)[0] > depth:
            raise ValueError(f"states: the teacher has layers 0 to {depth}, got {max(settings.states)[0]}")
        self._source = source
        self._settings = settings
        self._title = title
        self._launch = launch()
        self._tokenizer = settings.tokenizer if source.tokenizer is None else source.tokenizer
        self._tokens = token_columns(dataset, source.accepted, self._tokenizer, source.prefix)
        self._keys, self._lengths = keys_of(self._tokens, source.prefix)
        identity = source.identity(settings.mixed_precision)
        # The logits are known by None.
        self._caches: dict[State | None, AnswerCache] = {
            state: AnswerCache(settings.folder, output_identity(identity, _output(state), settings.storage))
            for state in (None, *settings.states)
        }

    def run(self) -> None:
        """Computes what is missing, shared among the ranks, and says so.

        Raises:
            UsageError: the folder cannot be written.
            DistillError: an answer cannot be kept.
        """
        start = time.monotonic()
        self._read()
        # The ranks deal the missing rows by what they read, so that none may write before all have read.
        self._launch.wait_for_everyone()
        computed = len(self._missing())
        hits = sum(all(key in cache for cache in self._caches.values()) for key in self._keys)
        self._fill(self._launch.process_index, self._launch.num_processes)
        self._launch.wait_for_everyone()
        self._read()
        # What another rank wrote to a disk that is not shared, or lost, is computed here.
        self._fill(0, 1)
        self._read()
        self._source.unload()
        if self._launch.is_main_process:
            self._write_manifests()
            rate = hits / len(self._keys) if self._keys else 1.0
            name = f"{self._source.name}{self._title}: " if self._title else ""
            self._settings.say(
                f"{name}{len(self._keys):,} rows, {rate:.1%} there, {computed:,} computed in "
                f"{time.monotonic() - start:.0f} s; {'; '.join(map(_summary, self._caches.values()))}"
            )

    def take(self, state: State | None) -> np.ndarray:
        """(N, W) in float32 of all rows: the logits (None) in the teacher's own order of labels, or these states.

        They can be taken once: states are large, and what was read of them is let go.
        """
        return self._caches.pop(state).values_of(self._keys)

    def _read(self) -> None:
        for cache in self._caches.values():
            cache.read()

    def _write_manifests(self) -> None:
        for cache in self._caches.values():
            try:
                cache.write_manifest(self._source.name)
            except OSError as error:
                # A complete cache serves also where nothing can be written.
                logger.info("teacher cache: no %s: %s", cache.folder, error)

    def _missing(self) -> list[int]:
        """One row for each key that one of the outputs lacks."""
        first: dict[bytes, int] = {}
        for row, key in enumerate(self._keys):
            if any(key not in cache for cache in self._caches.values()):
                first.setdefault(key, row)
        return list(first.values())

    def _fill(self, rank: int, ranks: int) -> None:
        """Computes this rank's batches and writes them shard by shard, the last one also on an interruption."""
        from tqdm.auto import tqdm

        missing = self._missing()
        if not missing:
            return
        lacking = {
            state: cache
            for state, cache in self._caches.items()
            if any(self._keys[row] not in cache for row in missing)
        }
        _check_writable(lacking.values())
        batches = length_sorted_batches([int(self._lengths[row]) for row in missing], self._settings.batch_size)
        batches = [[missing[i] for i in batch] for batch in batches][rank::ranks]
        states = [state for state in lacking if state is not None]
        answers = batched_answers(
            self._source.model,
            self._tokenizer,
            self._encoded(batches),
            PRECISIONS[self._settings.mixed_precision],
            states,
        )
        pending = _Pending(lacking, self._keys, self._launch.process_index)
        hidden = None if self._launch.is_main_process else True
        description = f"Teacher logits{self._title}"
        with tqdm(total=sum(map(len, batches)), desc=description, disable=hidden, leave=False, unit="row") as bar:
            try:
                for batch, (logits, *pooled) in zip(batches, answers, strict=True):
                    pending.add(batch, {None: logits, **dict(zip(states, pooled, strict=True))})
                    bar.update(len(batch))
            finally:
                pending.write()

    def _encoded(self, batches: Sequence[Sequence[int]]) -> Iterator[list[dict[str, Any]]]:
        """The tokens of these rows, without the padding at their end."""
        for batch in batches:
            columns = self._tokens[list(batch)]
            yield [
                {name: column[i][: self._lengths[row]] for name, column in columns.items()}
                for i, row in enumerate(batch)
            ]


@dataclass
class _Pending:
    """Answers on their way to shards."""

    caches: dict[State | None, AnswerCache]
    keys: Sequence[bytes]
    rank: int
    rows: list[int] = field(default_factory=list)
    answers: list[dict[State | None, np.ndarray]] = field(default_factory=list)
    written: float = field(default_factory=time.monotonic)

    def add(self, batch: Sequence[int], answers: dict[State | None, np.ndarray]) -> None:
        for state, cache in self.caches.items():
            _refuse(batch, answers[state], cache)
        self.rows += batch
        self.answers.append(answers)
        if len(self.rows) >= SHARD_ROWS or time.monotonic() - self.written > SHARD_SECONDS:
            self.write()

    def write(self) -> None:
        rows, answers = self.rows, self.answers
        self.rows, self.answers, self.written = [], [], time.monotonic()
        for state, cache in self.caches.items():
            places = [i for i, row in enumerate(rows) if self.keys[row] not in cache]
            if places:
                values = np.concatenate([answer[state] for answer in answers])[places]
                with _writing():
                    cache.add([self.keys[rows[i]] for i in places], values, self.rank)


def _output(state: State | None) -> str:
    return "logits" if state is None else pooled_column(*state).removeprefix(TEACHER_PREFIX)


def _refuse(batch: Sequence[int], answers: np.ndarray, cache: AnswerCache) -> None:
    """Raises a DistillError where a row's answer cannot be kept."""
    if not (wrong := not_to_be_kept(answers, cache.storage)).any():
        return
    if (broken := ~np.isfinite(answers).all(axis=1)).any():
        wrong, problem = broken, "NaN or infinite"
        remedy = 'run the teacher in a precision that does not overflow: in float32, or under "bf16"'
    else:
        largest = torch.finfo(STORAGES[cache.storage]).max
        problem = f"too large for {cache.storage} (at most {largest:g}, got {np.abs(answers).max():g})"
        remedy = "store them in " + " or ".join(s for s in ("bfloat16", "float32") if s != cache.storage)
    rows = [row for row, is_wrong in zip(batch, wrong, strict=True) if is_wrong]
    raise DistillError(
        f"the teacher's {cache.output} of row {min(rows)} are {problem}, as for {len(rows)} of the {len(batch)} rows "
        f"computed together; {remedy}. What was computed before is kept"
    )


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"the teacher's cache cannot be written: {error}") from error


def _check_writable(caches: Iterable[AnswerCache]) -> None:
    """Before the first row is computed, and not after."""
    for cache in caches:
        with _writing():
            cache.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(cache.folder)
            tempfile.TemporaryFile(dir=cache.folder).close()


def _summary(cache: AnswerCache) -> str:
    name = "" if cache.output == "logits" else f"{cache.output}: "
    error = "" if cache.storage == "float32" else f" as {cache.storage}, off by at most {cache.largest_error:.1e},"
    return f"{name}{len(cache):,} rows, {_bytes(cache.size())}{error} in {cache.folder}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
