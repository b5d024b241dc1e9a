"""Reads a split block by block, without ever holding the whole of it: files, a saved data set, or the Hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from distill_nlp.data_files import (
    LOADERS,
    asking_hub,
    first_line,
    is_saved,
    label_folders,
    load_saved,
    local_path,
    split_files,
)
from distill_nlp.errors import DistillError, UsageError, shown
from distill_nlp.text_files import SEPARATORS, check_header, check_quotes

BLOCK = 1000
"""Rows that are read at a time."""
_END = 1 << 20  # bytes of a file's beginning and end that it is known by

Columns = dict[str, list[Any]]
"""Part of the rows, column by column."""


@dataclass(frozen=True)
class Source:
    """A split that is read from its beginning as often as it is asked for.

    Args:
        columns: their names.
        identity: what tells it from another one, found without reading all of it.
        blocks: gives the rows in their order, the columns named alone, `None` where a value is missing.
        features: of a `datasets.Dataset`, where they are recorded.

    Example:
        >>> source = open_source("reviews", "train")
        >>> next(source.blocks(["text", "label"])).keys()
        dict_keys(['text', 'label'])
    """

    columns: list[str]
    identity: dict[str, Any]
    blocks: Callable[[list[str]], Iterator[Columns]]
    features: Any | None = None


def open_source(
    dataset: str, split: str, config_name: str | None = None, revision: str | None = None, label_column: str = "label"
) -> Source:
    """Opens a split to be streamed.

    Args:
        dataset, split, config_name, revision: as of `data_files.load_split`.
        label_column: of csv, whose values are words; it holds numbers if its first ones do.

    Raises:
        UsageError: not there, no such split, or of a kind that cannot be streamed.
        DistillError: the Hub cannot be reached.
    """
    path = local_path(dataset, "data.dataset")
    if not path.exists():
        if path.is_absolute() or dataset.startswith((".", "~")) or dataset.count("/") > 1 or path.suffix in LOADERS:
            raise UsageError(f"data.dataset: no file or folder {dataset}")
        return _hub_source(dataset, split, config_name, revision)
    try:
        if is_saved(path):
            return _saved_source(path, split)
        return _files_source(_files(path, split), label_column)
    except OSError as error:
        raise UsageError(f"data.dataset: cannot read {dataset}: {error.strerror or error}") from error


def _files(path: Path, split: str) -> list[Path]:
    if label_folders(path, split):
        raise UsageError(
            f"data.streaming: {path / split} has a folder per label, which is not streamed; write its texts into "
            f"{split}.jsonl, or leave data.streaming out"
        )
    return split_files(path, split)


def _files_source(files: list[Path], label_column: str) -> Source:
    for file in files:
        if file.stat().st_size == 0:
            raise UsageError(f"data: {file} is empty")
    read = {".parquet": _parquet, ".txt": _lines, ".csv": _table, ".tsv": _table}.get(files[0].suffix, _objects)
    features, kind = None, None
    if read is _parquet:
        columns, features = _parquet_schema(files[0])
    else:
        first = next(_guarded(files[0], read), {})
        columns = list(first)
        if not columns:
            raise UsageError(f"data: {files[0]} has no rows")
        if read is _table:
            kind = _kind(first.get(label_column, []))

    def blocks(wanted: list[str]) -> Iterator[Columns]:
        for file in files:
            for block in _guarded(file, read, wanted):
                rows = len(next(iter(block.values()), []))
                found = {name: block.get(name) or [None] * rows for name in wanted}
                if kind is not None and label_column in found:
                    found[label_column] = [_typed(value, kind) for value in found[label_column]]
                yield found

    return Source(columns, {"files": [_ends_of(file) for file in files]}, blocks, features)


def _guarded(
    file: Path, read: Callable[[Path, list[str] | None], Iterator[Columns]], wanted: list[str] | None = None
) -> Iterator[Columns]:
    """The blocks of a file; what is wrong with it is said in a line, with the rows before it."""
    rows = 0
    try:
        for block in read(file, wanted):
            yield block
            rows += len(next(iter(block.values()), []))
    except DistillError:
        raise
    except UnicodeDecodeError:
        raise UsageError(
            f"data: {file} is not UTF-8 (after row {rows}); convert it, e.g. iconv -f latin1 -t utf-8 {file.name}"
        ) from None
    except Exception as error:
        kind = file.suffix[1:]
        raise UsageError(f"data: cannot read {file} as {kind} (after row {rows}): {first_line(error)}") from error


# ---- kinds of files: all columns where none are named ----


def _table(file: Path, wanted: list[str] | None) -> Iterator[Columns]:
    import pandas as pd

    separator = SEPARATORS[file.suffix]
    check_header(file, separator)
    # Strings throughout: pandas would tell the types of each block anew.
    blocks = pd.read_csv(
        file, sep=separator, dtype=str, keep_default_na=False, na_values=[""], chunksize=BLOCK, encoding="utf-8"
    )
    with blocks:
        for i, block in enumerate(blocks):
            if file.suffix == ".tsv":
                check_quotes(file, dict(block.items()), i * BLOCK)
            chosen = block if wanted is None else block[[name for name in wanted if name in block.columns]]
            yield {
                str(name): [_plain_text(file, v) if isinstance(v, str) else None for v in chosen[name]]
                for name in chosen.columns
            }


def _plain_text(file: Path, text: str) -> str:
    if "\0" in text:
        raise UsageError(f"data: {file} has a NUL byte in {shown(text)}; it is damaged, or no text: take it out")
    return text


def _kind(values: list[str | None]) -> type:
    """What the labels of a csv are, as the datasets library would infer it."""
    there = [value for value in values if value is not None]
    if there and all(re.fullmatch(r"\s*[+-]?\d+\s*", value) for value in there):
        return int
    if there and all(value.lower() in ("true", "false") for value in there):
        return bool
    return str


def _typed(value: str | None, kind: type) -> Any:
    """A label as what the others are; a word that cannot be stays one, and is refused as no label of theirs."""
    if value is None or kind is str:
        return value
    if kind is bool:
        return {"true": True, "false": False}.get(value.lower(), value)
    return int(value) if re.fullmatch(r"\s*[+-]?\d+\s*", value) else value


def _text_lines(file: Path) -> Iterator[str]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines):
            text = line.decode("utf-8-sig" if number == 0 else "utf-8").rstrip("\r\n")
            yield _plain_text(file, text)


def _objects(file: Path, wanted: list[str] | None) -> Iterator[Columns]:
    """Objects of JSON, one a line; each is read by itself, so that later ones may have more keys."""
    lines = ((number, text) for number, text in enumerate(_text_lines(file), 1) if text.strip())
    while some := [_object(file, number, text) for number, text in islice(lines, BLOCK)]:
        names = wanted if wanted is not None else list(dict.fromkeys(name for row in some for name in row))
        yield {name: [row.get(name) for row in some] for name in names}


def _object(file: Path, number: int, text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = "; a list of all rows is not streamed: write each on a line" if text.lstrip().startswith("[") else ""
        raise UsageError(f"data: cannot read line {number} of {file} as json: {first_line(error)}{hint}") from None
    if not isinstance(row, dict):
        raise UsageError(
            f"data: line {number} of {file} holds {shown(row)}, and no object with columns; write each row as one on a "
            "line"
        )
    return row


def _lines(file: Path, wanted: list[str] | None) -> Iterator[Columns]:
    lines = _text_lines(file)
    while some := list(islice(lines, BLOCK)):
        yield {"text": some}


def _parquet(file: Path, wanted: list[str] | None) -> Iterator[Columns]:
    from pyarrow.parquet import ParquetFile

    # A buffer, or a whole row group would be in memory.
    with ParquetFile(file, buffer_size=_END, pre_buffer=False) as table:
        there = table.schema_arrow.names
        names = there if wanted is None else [name for name in wanted if name in there]
        for batch in table.iter_batches(batch_size=BLOCK, columns=names):
            yield batch.to_pydict()


def _parquet_schema(file: Path) -> tuple[list[str], Any]:
    from datasets import Features
    from pyarrow.parquet import read_schema

    try:
        schema = read_schema(file)
        return schema.names, Features.from_arrow_schema(schema)
    except Exception as error:
        raise UsageError(f"data: cannot read {file} as parquet: {first_line(error)}") from error


# ---- other places ----


def _saved_source(path: Path, split: str) -> Source:
    saved = load_saved(path, split)

    def blocks(wanted: list[str]) -> Iterator[Columns]:
        for table in saved.select_columns(wanted).with_format("arrow").iter(batch_size=BLOCK):
            yield table.to_pydict()

    files = sorted({Path(file["filename"]) for file in saved.cache_files})
    return Source(saved.column_names, {"files": [_ends_of(file) for file in files]}, blocks, saved.features)


def _hub_source(dataset: str, split: str, config_name: str | None, revision: str | None) -> Source:
    from datasets import load_dataset

    with asking_hub(dataset):
        stream = load_dataset(dataset, config_name, split=split, revision=revision, streaming=True)
        columns = stream.column_names or list(next(iter(stream), {}))

    def blocks(wanted: list[str]) -> Iterator[Columns]:
        rows = 0
        try:
            # Not by `iter()`: in a worker of a loader, that gives a part of the rows.
            for block in stream.select_columns(wanted).iter(batch_size=BLOCK):
                yield {name: list(block[name]) for name in wanted}
                rows += len(block[wanted[0]])
        except Exception as error:
            raise DistillError(
                f"data.dataset: the stream of {dataset!r} broke off after row {rows} of {split!r}: {first_line(error)}"
                "; the same command goes on from the last checkpoint"
            ) from error

    identity = {"hub": dataset, "config": config_name, "revision": revision, "split": split}
    return Source(columns, identity, blocks, stream.features)


def _ends_of(file: Path) -> dict[str, Any]:
    """A file by its name, size, first and last MiB: all of it may be more than can be read each time."""
    size, digest = file.stat().st_size, hashlib.sha256()
    with open(file, "rb") as stream:
        digest.update(stream.read(_END))
        stream.seek(max(size - _END, 0))
        digest.update(stream.read(_END))
    return {"name": file.name, "bytes": size, "ends": digest.hexdigest()[:16]}
