"""Fills the teacher's cache for a data set, and puts the logits beside its rows."""

from __future__ import annotations

import inspect
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from distill_nlp.errors import UsageError
from distill_nlp.inference import batched_logits, length_sorted_batches
from distill_nlp.loading import load_classifier, load_config
from distill_nlp.modeling import accepted_arguments, bare_model
from distill_nlp.stages import read_json
from distill_nlp.teacher import TEACHER_LOGITS
from distill_nlp.teacher_cache import (
    PRECISIONS,
    LogitsCache,
    model_tensors,
    row_keys,
    teacher_identity,
    weights_hash,
)

logger = logging.getLogger(__name__)

# A shard is written at the first of these: a killed fill loses no more.
SHARD_ROWS = 8192
SHARD_SECONDS = 30.0
_CHUNK = 8192


def cache_teacher_logits(
    teacher: nn.Module | str | Path,
    dataset: Any,
    tokenizer: Any,
    folder: str | Path,
    mixed_precision: str = "no",
    batch_size: int = 64,
    revision: str | None = None,
    say: Callable[[str], None] = logger.info,
) -> Any:
    """Gives the data set with a column `teacher_logits`, for a `CachedTeacher`; computes only what is not on disk yet.

    Rows are known by their token ids, not by their place: a cache serves any order, batch size, padding and student,
    and several data sets. The ranks of a launch share the work; each must call this, with the same rows.

    Args:
        teacher: the fine-tuned teacher, run where it is; or its folder or Hub id, loaded only if a row is missing.
        dataset: a tokenized `datasets.Dataset`.
        tokenizer: pads.
        folder: of caches; each teacher has a sub-folder.
        mixed_precision: autocast of the teacher, as in training: "no", "bf16" or "fp16".
        batch_size: rows of one forward pass.
        revision: of a teacher on the Hub.
        say: gets a line at the end, on the main rank: rows, hit rate, seconds, size.

    Raises:
        ValueError: no `datasets.Dataset`, or no token ids in it.
        UsageError: the folder cannot be written, or there is no such teacher.

    Example:
        >>> train = cache_teacher_logits(teacher, train, tokenizer, "teacher_cache")
    """
    # As TrainingArguments do it: a launcher may have asked for the CPU, which PartialState alone does not look at.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    source = TeacherSource(teacher, revision, state.device)
    columns = _token_columns(dataset, source.accepted, tokenizer)
    keys, lengths = _keys_of(dataset, columns)
    cache = LogitsCache(folder, source.identity(mixed_precision))
    start = time.monotonic()
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the teacher's cache cannot be written: {error}") from error
    cache.read()
    # The ranks deal the missing rows by what they read, so that none may write before all have read.
    state.wait_for_everyone()
    first = _first_rows(keys, cache)
    hits = sum(key in cache for key in keys)

    def fill(rank: int, ranks: int) -> None:
        missing = _first_rows(keys, cache)
        if missing:
            rows = dataset.select_columns(columns).with_format(None)
            batches = length_sorted_batches([int(lengths[i]) for i in missing], batch_size)
            batches = [[missing[i] for i in batch] for batch in batches][rank::ranks]
            _fill(cache, batches, keys, lengths, rows, source.model, tokenizer, PRECISIONS[mixed_precision], state)

    fill(state.process_index, state.num_processes)
    state.wait_for_everyone()
    cache.read()
    # What another rank wrote to a disk that is not shared, or lost, is computed here.
    fill(0, 1)
    cache.read()
    if state.is_main_process:
        cache.write_manifest(source.name)
        rate = hits / len(keys) if keys else 1.0
        say(
            f"{len(keys):,} rows, {rate:.1%} there, {len(first):,} computed in {time.monotonic() - start:.0f} s; "
            f"{len(cache):,} rows, {_bytes(cache.size())} in {cache.folder}"
        )
    return _with_logits(dataset, cache.logits_of(keys))


class TeacherSource:
    """A teacher that is loaded only when it has to answer.

    Args:
        teacher: a model, or the folder or Hub id of one.
        revision: on the Hub.
        device: where a model that is loaded here goes.
    """

    def __init__(self, teacher: nn.Module | str | Path, revision: str | None = None, device: Any = "cpu") -> None:
        self._given = teacher if isinstance(teacher, nn.Module) else None
        self.name = type(bare_model(teacher)).__name__ if isinstance(teacher, nn.Module) else str(teacher)
        self._revision = revision
        self._device = device

    @cached_property
    def model(self) -> nn.Module:
        if self._given is not None:
            return self._given
        return load_classifier(self.name, self._revision).to(self._device)

    @cached_property
    def config(self) -> Any:
        return self._given.config if self._given is not None else load_config(self.name, self._revision)

    @cached_property
    def _class(self) -> type[nn.Module]:
        """The model's class; read from the config where that says it."""
        if self._given is None:
            known = AutoModelForSequenceClassification._model_mapping.get(type(self.config), None)
            if inspect.isclass(known):
                return known
        return type(bare_model(self.model))

    @property
    def accepted(self) -> set[str] | None:
        """Names that the teacher's forward declares, None if it takes any."""
        return accepted_arguments(self.model if self._given is not None else self._class)

    @cached_property
    def _weights(self) -> str:
        files = None if self._given is not None else weight_files(self.name, self._revision)
        return weights_hash(model_tensors(self.model) if files is None else _as_loaded(files))

    def identity(self, mixed_precision: str) -> dict[str, Any]:
        return teacher_identity(self.config, self._class.__name__, self._weights, mixed_precision)


def weight_files(name: str, revision: str | None = None) -> list[Path] | None:
    """The safetensors files of a checkpoint, or None where it has none (a pickle, an adapter)."""

    def find(file: str) -> Path | None:
        path = cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if path is None else Path(path)

    if (single := find(SAFE_WEIGHTS_NAME)) is not None:
        return [single]
    index = find(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return None
    found = [find(file) for file in sorted(set((read_json(index) or {}).get("weight_map", {}).values()))]
    return [path for path in found if path is not None] if found and None not in found else None


def _as_loaded(files: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint in the dtype in which `load_classifier` gives them."""
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                yield name, tensor.float() if tensor.is_floating_point() else tensor


# ---- rows ----


def _token_columns(dataset: Any, accepted: set[str] | None, tokenizer: Any) -> list[str]:
    """The columns that the teacher takes, as `DistillationTrainer` would hand them to it."""
    if not hasattr(dataset, "with_format"):
        raise ValueError(
            f"the teacher's logits go beside the rows of a datasets.Dataset, got {type(dataset).__name__}; "
            "datasets.Dataset.from_list makes one"
        )
    wanted = set(tokenizer.model_input_names) if accepted is None else accepted
    columns = [c for c in dataset.column_names if c in wanted - {"labels", TEACHER_LOGITS}]
    if "input_ids" not in columns:
        raise ValueError(f"there are no token ids (input_ids) in the data, only {', '.join(dataset.column_names)}")
    return columns


def _keys_of(dataset: Any, columns: Sequence[str]) -> tuple[list[bytes], np.ndarray]:
    """The keys and the lengths of all rows."""
    keys: list[bytes] = []
    lengths = [np.empty(0, dtype=np.int64)]
    for table in dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=_CHUNK):
        values, ends = {}, {}
        for name in columns:
            lists = table.column(name).combine_chunks()
            flat = lists.flatten().to_numpy(zero_copy_only=False) if hasattr(lists, "value_lengths") else np.empty(0)
            if flat.dtype.kind not in "iu":
                raise ValueError(f"the column {name} must hold lists of whole numbers, got {lists.type}")
            values[name] = flat
            ends[name] = np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False))
        for name in columns:
            if not np.array_equal(ends[name], ends["input_ids"]):
                raise ValueError(f"the rows of {name} are not as long as those of input_ids")
        some_keys, some_lengths = row_keys(values, ends["input_ids"])
        keys += some_keys
        lengths.append(some_lengths)
    return keys, np.concatenate(lengths)


def _first_rows(keys: Sequence[bytes], cache: LogitsCache) -> list[int]:
    """One row for each key that the cache lacks."""
    first: dict[bytes, int] = {}
    for row, key in enumerate(keys):
        if key not in cache:
            first.setdefault(key, row)
    return list(first.values())


def _fill(
    cache: LogitsCache,
    batches: Sequence[Sequence[int]],
    keys: Sequence[bytes],
    lengths: np.ndarray,
    rows: Any,
    model: nn.Module,
    tokenizer: Any,
    autocast: torch.dtype | None,
    state: PartialState,
) -> None:
    """Computes these batches of rows and writes them shard by shard, the last one also on an interruption."""
    from tqdm.auto import tqdm

    def encoded() -> Iterable[list[dict[str, Any]]]:
        for batch in batches:
            columns = rows[list(batch)]
            yield [{name: column[i][: lengths[row]] for name, column in columns.items()} for i, row in enumerate(batch)]

    pending: list[tuple[Sequence[int], np.ndarray]] = []
    written = time.monotonic()

    def write() -> None:
        nonlocal written
        if pending:
            shard_keys = [keys[row] for batch, _ in pending for row in batch]
            cache.add(shard_keys, np.concatenate([logits for _, logits in pending]), state.process_index)
            pending.clear()
        written = time.monotonic()

    hidden = None if state.is_main_process else True
    with tqdm(total=sum(map(len, batches)), desc="Teacher logits", disable=hidden, leave=False, unit="row") as bar:
        try:
            for batch, logits in zip(batches, batched_logits(model, tokenizer, encoded(), autocast), strict=True):
                pending.append((batch, logits))
                bar.update(len(batch))
                if sum(len(b) for b, _ in pending) >= SHARD_ROWS or time.monotonic() - written > SHARD_SECONDS:
                    write()
        finally:
            write()


def _with_logits(dataset: Any, logits: np.ndarray) -> Any:
    """The data set with the logits as a column of float32 lists."""
    import pyarrow

    if TEACHER_LOGITS in dataset.column_names:
        dataset = dataset.remove_columns(TEACHER_LOGITS)
    ends = pyarrow.array(np.arange(len(logits) + 1) * logits.shape[1], type=pyarrow.int32())
    column = pyarrow.ListArray.from_arrays(ends, pyarrow.array(logits.reshape(-1), type=pyarrow.float32()))
    # Without one given, the data set would be known by a hash over the whole column.
    return dataset.add_column(TEACHER_LOGITS, column, new_fingerprint=os.urandom(8).hex())


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
